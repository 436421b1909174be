"""A file of prompts is a long step: nothing answered is lost, nothing is lost in silence."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import live
import pytest
import stub_server

from steerlm_nemo.client.pool import ServerPool
from steerlm_nemo.conversation import SYSTEM_PROMPT
from steerlm_nemo.errors import IncompleteError, InputError
from steerlm_nemo.steering.steer import Sampling, steer_file

SCRIPT = Path(__file__).parents[2] / "scripts" / "steered_inference.py"
CASES = Path(__file__).parents[3] / "shared" / "cases" / "serving"


def responder(**options):
    return stub_server.build_stub(served=stub_server.STEERED, **options)


def records(count):
    return [
        {"id": n, "prompt": f"When do zorps rise? {n // 3}", "attributes": {"quality": n % 5}} for n in range(count)
    ]


def write(path, made):
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in made))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(record):
    """The record as it must come out."""
    line = stub_server.FORMAT.schema.complete(record["attributes"]).line
    said = f"<extra_id_0>System\n{SYSTEM_PROMPT}\n<extra_id_1>User\n{record['prompt']}\n<extra_id_1>Assistant\n"
    return {**record, "response": stub_server.response(f"{said}<extra_id_2>{line}\n"), "response_attributes": line}


def run(source, output, ports, *, batch_size=1, in_flight=4, sampling=None, allow_rejected=False, retries=2):
    with ServerPool([("127.0.0.1", port) for port in ports], 20.0, retries, in_flight) as servers:
        return steer_file(source, output, {}, servers, batch_size, sampling=sampling, allow_rejected=allow_rejected)


def finished(output):
    return [entry["record"] for entry in read(Path(f"{output}.progress.jsonl"))[1:]]


@pytest.mark.parametrize(("batch_size", "in_flight"), [(1, 1), (1, 8), (7, 3)])
def test_every_record_is_answered_in_the_order_of_the_input(tmp_path, batch_size, in_flight):
    made = records(40)
    source = write(tmp_path / "in.jsonl", made)
    with live.run_app(responder()) as one, live.run_app(responder()) as two:
        done = run(source, tmp_path / "out.jsonl", [one, two], batch_size=batch_size, in_flight=in_flight)
    assert read(tmp_path / "out.jsonl") == [answered(record) for record in made]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.report.json"]
    assert "40 records answered (0 of them by an earlier run)" in done.text() and "by model stub-1" in done.text()


BAD = {
    '{"prompt": "a"': "not JSON",
    "[1]": "a JSON object is needed, found list",
    '{"id": 1}': "wrong type: a record needs 'prompt'",
    '{"prompt": 1}': "wrong type: a record needs 'prompt'",
    '{"messages": [1]}': "wrong type: a record needs 'prompt'",
    '{"messages": []}': "messages is empty",
    '{"messages": [{"role": "tool", "content": "a"}]}': "role 'tool' is not known",
    '{"prompt": "a", "attributes": {"quality": 5}}': "quality is 5, but it must be 0 to 4",
    '{"prompt": "a", "attributes": {"qualty": 1}}': "unknown attribute 'qualty'; did you mean 'quality'?",
    '{"prompt": "a", "attributes": "quality:1"}': "wrong type: 'attributes' must be an object",
    '{"prompt": "a", "system": 1}': "'system' a string",
    '{"prompt": "a", "score": 1e999}': "not JSON compliant",
    '{"prompt": "\\ud800"}': "lone surrogate",
    json.dumps({"prompt": "a " * 3000}): "answered 400: sentences has one of",
}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_record_that_cannot_be_answered_is_named_and_costs_no_other_its_answer(tmp_path, batch_size):
    made = records(len(BAD) + 1)
    source = tmp_path / "in.jsonl"
    write(source, [one for pair in zip(made, BAD, strict=False) for one in pair] + made[len(BAD) :])
    output = tmp_path / "out.jsonl"
    with live.run_app(responder()) as port:
        with pytest.raises(IncompleteError) as err:
            run(source, output, [port], batch_size=batch_size)
        said = str(err.value)
        assert err.value.exit_code == 3 and f"{len(BAD)} of {2 * len(BAD) + 1} records could not be answered" in said
        assert f"the first {source}:" in said and f"(the other {len(made)} are kept)" in said
        assert not output.exists()
        found = {
            int(one["where"].rpartition(":")[2]): one["reason"] for one in read(tmp_path / "out.jsonl.rejects.jsonl")
        }
        assert sorted(found) == [2 * number + 2 for number in range(len(BAD))]
        for number, reason in enumerate(BAD.values()):
            assert reason in found[2 * number + 2]
        done = run(source, output, [port], batch_size=batch_size, allow_rejected=True)
    assert (done.num_records, done.num_resumed, done.num_rejected) == (len(made), len(made), len(BAD))
    assert read(output) == [answered(record) for record in made]


def test_an_attribute_of_the_command_that_the_model_does_not_have_is_refused_at_once(tmp_path):
    source, app = write(tmp_path / "in.jsonl", records(2)), responder()
    with (
        live.run_app(app) as port,
        ServerPool([("127.0.0.1", port)]) as servers,
        pytest.raises(InputError, match="did you mean 'humor'"),
    ):
        steer_file(source, tmp_path / "out.jsonl", {"humr": 1}, servers, 1)
    assert not app.state.asked


def test_ten_kills_at_random_moments_lose_and_double_nothing(tmp_path):
    made, chance = records(150), random.Random()
    source, output = write(tmp_path / "in.jsonl", made), tmp_path / "out.jsonl"
    journal = Path(f"{output}.progress.jsonl")
    app = responder(pause_s=0.005)
    with live.run_app(app) as one, live.run_app(app) as two:
        command = [sys.executable, SCRIPT, f"--input_file={source}", f"--output_file={output}", "--concurrency=1"]
        command += [f"--endpoints=127.0.0.1:{one},127.0.0.1:{two}", "--batch_size=2"]
        for kill in range(10):
            process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
            goal = 12 * kill + chance.randint(1, 12)  # lines of the journal
            while not (journal.exists() and journal.read_bytes().count(b"\n") >= goal):
                assert process.poll() is None
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert not output.exists()
        before, asked = journal.read_bytes().count(b"\n") - 1, len(app.state.asked)
        result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert f"150 records answered ({before} of them by an earlier run)" in result.stdout
    assert len(app.state.asked) - asked == 150 - before  # nothing that was done is asked again
    assert read(output) == [answered(record) for record in made]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.report.json"]


def test_no_response_of_a_second_model_gets_in(tmp_path):
    made = records(40)
    source, output = write(tmp_path / "in.jsonl", made), tmp_path / "out.jsonl"
    swapped = stub_server.Swapped(responder(identity="first"), responder(identity="second", salt="x"), 15)
    with (
        live.run_app(swapped) as port,
        pytest.raises(InputError, match="model first when this run began and serves second now"),
    ):
        run(source, output, [port])
    assert not output.exists() and finished(output)
    assert all(record == answered(made[record["id"]]) for record in finished(output))


def test_what_was_asked_cannot_change_halfway(tmp_path):
    source, output = write(tmp_path / "in.jsonl", [*records(2), "{"]), tmp_path / "out.jsonl"
    with live.run_app(responder()) as port:
        with pytest.raises(IncompleteError):
            run(source, output, [port])
        with pytest.raises(InputError, match="tokens_to_generate was 512, now 9"):
            run(source, output, [port], sampling=Sampling(tokens_to_generate=9))


def test_servers_that_are_gone_end_the_run_with_exit_code_3_and_it_can_be_resumed(tmp_path, fast_retries):
    made = records(60)
    source, output = write(tmp_path / "in.jsonl", made), tmp_path / "out.jsonl"
    with live.run_app(responder(dies_after=20)) as port, pytest.raises(IncompleteError) as err:
        run(source, output, [port])
    assert err.value.exit_code == 3 and "of 60 records answered" in str(err.value)
    with live.run_app(responder()) as port:
        assert run(source, output, [port]).num_resumed >= 20
    assert read(output) == [answered(record) for record in made]


def test_the_case_of_one_long_record_among_six_hundred(tmp_path):
    source = CASES / "B3-steered-file-lost" / "prompts_bad.jsonl"
    if not source.exists():
        pytest.skip(f"no such case: {source}")
    output = tmp_path / "out.jsonl"
    with live.run_app(responder()) as port:
        command = [sys.executable, SCRIPT, f"--input_file={source}", f"--output_file={output}"]
        command += ["--host=127.0.0.1", f"--port_num={port}"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 3 and "Traceback" not in result.stderr
        (reject,) = read(tmp_path / "out.jsonl.rejects.jsonl")
        assert f"1 of 600 records could not be answered (not answered: 1), the first {reject['where']}" in result.stderr
        result = subprocess.run([*command, "--allow_rejected"], capture_output=True, text=True)
    assert result.returncode == 0 and "599 records answered (599 of them by an earlier run)" in result.stdout
    line = int(reject["where"].rpartition(":")[2])
    rest = [one for number, one in enumerate(read(source), 1) if number != line]
    assert read(output) == [answered({"attributes": {}, **one}) for one in rest]
