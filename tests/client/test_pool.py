"""Annotation on one or many servers that fail, are killed, or are not what they were."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import httpx
import live
import pytest
import stub_server
import threads

from steerlm_nemo.annotation.annotate import annotate
from steerlm_nemo.annotation.thread import AnnotationSettings
from steerlm_nemo.attributes import NEMO12
from steerlm_nemo.client.pool import ServerPool, parse_endpoints
from steerlm_nemo.errors import IncompleteError, InputError
from steerlm_nemo.serving.listener import open_listener

SCRIPT = Path(__file__).parents[2] / "scripts" / "attribute_annotate.py"
STUB = Path(stub_server.__file__)


def free_port():
    with open_listener(0) as listener:
        return listener.getsockname()[1]


def grade(source, output, ports, *, batch_size=1, settings=None, **options):
    options = {"timeout_s": 20.0, "retries": 2, **options}
    with ServerPool([("127.0.0.1", port) for port in ports], **options) as servers:
        return annotate(source, output, servers, settings or AnnotationSettings(), batch_size=batch_size)


def test_labels_are_the_same_whatever_the_batch_the_concurrency_and_the_servers(tmp_path):
    made = threads.records(120)
    source = threads.write(tmp_path / "in.jsonl", made)
    with (
        live.run_app(stub_server.build_stub()) as one,
        live.run_app(stub_server.build_stub()) as two,
        live.run_app(stub_server.build_stub()) as three,
    ):
        for number, (batch_size, in_flight, ports) in enumerate(
            [(1, 1, [one]), (1, 32, [one]), (7, 3, [one, two]), (200, 2, [three]), (2, 4, [one, two, three])]
        ):
            output = tmp_path / f"out{number}.jsonl"
            grade(source, output, ports, batch_size=batch_size, in_flight=in_flight)
            assert threads.read(output) == [threads.expected(record) for record in made]
            assert output.read_bytes() == (tmp_path / "out0.jsonl").read_bytes()


def test_servers_share_the_work_each_within_its_bound(tmp_path):
    made = threads.records(200)
    source = threads.write(tmp_path / "in.jsonl", made)
    apps = [stub_server.build_stub(pause_s=0.01) for _ in range(2)]
    with live.run_app(apps[0]) as one, live.run_app(apps[1]) as two:
        grade(source, tmp_path / "out.jsonl", [one, two], in_flight=4)
    assert all(app.state.largest["most"] <= 4 for app in apps)
    asked = [[prompt for prompt, _ in app.state.asked] for app in apps]
    num_turns = sum(turn["from"] == "Assistant" for record in made for turn in record["conversations"])
    assert sum(map(len, asked)) == num_turns  # no turn is asked twice
    assert all(len(prompts) > num_turns / 5 for prompts in asked)


def test_a_turns_prompt_goes_on_from_the_prompt_and_line_before_it(tmp_path):
    """So a server that keeps what it has computed computes no token twice."""
    source = threads.write(tmp_path / "in.jsonl", [r for r in threads.records(30) if len(r["conversations"]) == 4])
    app = stub_server.build_stub()
    with live.run_app(app) as port:
        grade(source, tmp_path / "out.jsonl", [port], in_flight=1)
    prompts = [prompt for prompt, _ in app.state.asked]
    for first, second in zip(prompts[::2], prompts[1::2], strict=True):
        assert second.startswith(first + stub_server.line(first, {})[0] + "\n<extra_id_1>User\n")


def test_conversations_that_begin_alike_run_one_after_the_other(tmp_path):
    made = [record for record in threads.records(60) if len(record["conversations"]) == 2]
    source = threads.write(tmp_path / "in.jsonl", [*made, *reversed(made)])
    app = stub_server.build_stub()
    with live.run_app(app) as port:
        grade(source, tmp_path / "out.jsonl", [port], in_flight=1)
    prompts = [prompt for prompt, _ in app.state.asked]
    assert prompts[::2] == prompts[1::2]
    assert threads.read(tmp_path / "out.jsonl") == [threads.expected(record) for record in [*made, *reversed(made)]]


def test_a_turn_that_threads_of_a_tree_have_in_common_is_asked_about_once(tmp_path):
    made = threads.records(120)
    for record in made[::9]:  # what people said differs, so these are other questions
        record["conversations"][1]["label"] = "humor:2"
    source = threads.write(tmp_path / "in.jsonl", made)
    app = stub_server.build_stub()
    with live.run_app(app) as port:
        grade(source, tmp_path / "out.jsonl", [port], batch_size=120, settings=AnnotationSettings(only_missing=True))
    asked = [(prompt, tuple(given.items())) for prompt, given in app.state.asked]
    num_turns = sum(turn["from"] == "Assistant" for record in made for turn in record["conversations"])
    assert len(asked) == len(set(asked)) < num_turns
    with live.run_app(stub_server.build_stub()) as port:
        grade(source, tmp_path / "alone.jsonl", [port], settings=AnnotationSettings(only_missing=True))
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "alone.jsonl").read_bytes()


def test_a_server_that_is_away_leaves_its_work_to_the_others(tmp_path, fast_retries, capsys):
    made = threads.records(40)
    source = threads.write(tmp_path / "in.jsonl", made)
    away = free_port()
    with live.run_app(stub_server.build_stub()) as port:
        grade(source, tmp_path / "out.jsonl", [away, port])
    assert threads.read(tmp_path / "out.jsonl") == [threads.expected(record) for record in made]
    assert f"WARNING: no server answers at http://127.0.0.1:{away}" in capsys.readouterr().err


def test_servers_of_different_models_are_refused_by_both_names(tmp_path):
    source = threads.write(tmp_path / "in.jsonl", threads.records(3))
    other_schema = replace(stub_server.FORMAT, schema=NEMO12)
    with (
        live.run_app(stub_server.build_stub("first")) as one,
        live.run_app(stub_server.build_stub("second")) as two,
        live.run_app(stub_server.build_stub("first", other_schema)) as three,
    ):
        with pytest.raises(InputError, match=rf":{two} serves second, but the run began with first"):
            grade(source, tmp_path / "out.jsonl", [one, two])
        with pytest.raises(
            InputError, match=rf"(?s)disagree about kind, markers or attributes.*nemo12\+lang.*:{three}"
        ):
            grade(source, tmp_path / "out.jsonl", [one, three])
    assert not (tmp_path / "out.jsonl").exists()


def test_a_run_goes_on_with_the_model_that_began_it_and_no_other(tmp_path):
    made = threads.records(4)
    source = threads.write(tmp_path / "in.jsonl", made)
    with source.open("a") as file:
        file.write("{\n")  # keeps the run from finishing
    with live.run_app(stub_server.build_stub("first")) as port, pytest.raises(IncompleteError):
        grade(source, tmp_path / "out.jsonl", [port])
    with (
        live.run_app(stub_server.build_stub("second")) as port,
        pytest.raises(InputError, match="model was 'first', now 'second'"),
    ):
        grade(source, tmp_path / "out.jsonl", [port])
    threads.write(source, made)
    with live.run_app(stub_server.build_stub("first")) as port:
        assert grade(source, tmp_path / "out.jsonl", [port]).num_resumed == 4


def test_a_model_that_changes_during_the_run_ends_it(tmp_path, fast_retries):
    source = threads.write(tmp_path / "in.jsonl", threads.records(80))
    app = stub_server.build_stub("first", pause_s=0.005)
    renamed = threading.Timer(0.3, lambda: setattr(app.state, "identity", "second"))
    renamed.start()
    with (
        live.run_app(app) as port,
        pytest.raises(InputError, match=r"model first when this run began and serves second"),
    ):
        grade(source, tmp_path / "out.jsonl", [port], in_flight=1)
    renamed.join()
    assert not (tmp_path / "out.jsonl").exists()


LINE, SLOTS = AnnotationSettings(), AnnotationSettings(mode="slots")
COMPAT = AnnotationSettings(mode="slots", turns="all", compat=True)


def finished(output):
    """The records that a run which did not end has in its journal."""
    return [entry["record"] for entry in threads.read(Path(f"{output}.progress.jsonl"))[1:]]


@pytest.mark.parametrize(
    ("settings", "tells_model", "second_is"),
    [
        (LINE, True, "another model"),
        (LINE, False, "the reference's server"),
        (SLOTS, True, "another model"),
        (SLOTS, False, "another model"),
        (COMPAT, False, "another model"),
        (COMPAT, True, "the reference's server"),
    ],
)
def test_no_record_graded_by_a_second_model_gets_in(tmp_path, fast_retries, settings, tells_model, second_is):
    made = [{**record, "system": "A chat.\n"} for record in threads.records(30)]
    source, output = threads.write(tmp_path / "in.jsonl", made), tmp_path / "out.jsonl"
    with live.run_app(stub_server.build_stub("first")) as port:
        grade(source, tmp_path / "whole.jsonl", [port], batch_size=2, settings=settings)
    whole = threads.read(tmp_path / "whole.jsonl")
    first = stub_server.build_stub("first", tells_model=tells_model)
    second = stub_server.build_stub(
        "second", tells_model=tells_model, salt="x", only_generate=second_is == "the reference's server"
    )
    after = 25 if settings is LINE else 300
    with live.run_app(stub_server.Swapped(first, second, after)) as port, pytest.raises(InputError) as err:
        grade(source, output, [port], batch_size=2, settings=settings, in_flight=2)
    now = "second" if second_is == "another model" else "a model that its server does not name"
    assert f"model first when this run began and serves {now} now" in str(err.value)
    assert not output.exists() and 0 < len(finished(output)) < 30
    assert all(record in whole for record in finished(output))
    with live.run_app(stub_server.build_stub("first")) as port:
        assert grade(source, output, [port], batch_size=2, settings=settings).num_resumed
    assert threads.read(output) == whole


@pytest.mark.parametrize("settings", [LINE, SLOTS, COMPAT], ids=["line", "slots", "compat"])
def test_servers_of_two_models_are_refused_naming_both(tmp_path, settings):
    source = threads.write(tmp_path / "in.jsonl", threads.records(4))
    apps = [stub_server.build_stub("first"), stub_server.build_stub("second", salt="x")]
    with live.run_app(apps[0]) as one, live.run_app(apps[1]) as two, pytest.raises(InputError) as err:
        grade(source, tmp_path / "out.jsonl", [one, two], settings=settings)
    said = f"http://127.0.0.1:{two} serves second, but the run began with first at http://127.0.0.1:{one}."
    assert said in str(err.value)
    assert not any(app.state.asked for app in apps)


def test_a_server_that_comes_later_with_another_model_is_asked_nothing(tmp_path, fast_retries):
    source, port, done = threads.write(tmp_path / "in.jsonl", threads.records(200)), free_port(), threading.Event()
    late = stub_server.build_stub("second", salt="x")

    def come():
        time.sleep(0.3)
        with live.run_app(late, port):
            done.wait(20)

    comes = threading.Thread(target=come)
    with live.run_app(stub_server.build_stub("first", pause_s=0.02)) as one:
        comes.start()
        with pytest.raises(InputError, match="serves second, but the run began with first"):
            grade(source, tmp_path / "out.jsonl", [one, port], in_flight=1, retries=12)
        done.set()
        comes.join()
    assert not late.state.asked


def test_who_does_not_name_the_model_is_said_once_and_kept(tmp_path, capfd):
    made = [{**record, "system": "A chat.\n"} for record in threads.records(3)]
    source, output = threads.write(tmp_path / "in.jsonl", made), tmp_path / "out.jsonl"
    with source.open("a") as file:
        file.write("{\n")  # keeps the run from finishing
    with live.run_app(stub_server.build_stub(only_generate=True)) as port, pytest.raises(IncompleteError):
        grade(source, output, [port], settings=COMPAT)
    assert capfd.readouterr().err.count("does not tell which model it serves") == 1
    with (
        live.run_app(stub_server.build_stub("first")) as port,
        pytest.raises(InputError, match="model was None, now 'first'"),
    ):
        grade(source, output, [port], settings=COMPAT)
    threads.write(source, made)
    with live.run_app(stub_server.build_stub(only_generate=True)) as port:
        said = grade(source, output, [port], settings=COMPAT).text()
    assert "by a model that its server does not name" in said
    assert json.loads((tmp_path / "out.jsonl.report.json").read_text())["model"] is None


def test_when_all_servers_are_gone_the_run_stops_with_exit_code_3_and_can_be_resumed(tmp_path, fast_retries):
    made = threads.records(150)
    source, output = threads.write(tmp_path / "in.jsonl", made), tmp_path / "out.jsonl"
    with (
        live.run_app(stub_server.build_stub(dies_after=40)) as one,
        live.run_app(stub_server.build_stub(dies_after=60)) as two,
    ):
        with pytest.raises(IncompleteError, match=r"stopped with \d+ of 150 records") as err:
            grade(source, output, [one, two])
        assert err.value.exit_code == 3 and f":{one}" in str(err.value) and f":{two}" in str(err.value)
    assert not output.exists()
    with live.run_app(stub_server.build_stub()) as port:
        assert grade(source, output, [port]).num_resumed > 0
    assert threads.read(output) == [threads.expected(record) for record in made]


def survive(tmp_path, num_threads, num_kills, share):
    """Annotate while the server answers with faults and is killed again and again. Returns kills and faults."""
    made = threads.records(num_threads)
    source, output, log = threads.write(tmp_path / "in.jsonl", made), tmp_path / "out.jsonl", tmp_path / "faults.txt"
    journal = Path(f"{output}.progress.jsonl")
    port, done, kills = free_port(), threading.Event(), []
    command = [sys.executable, STUB, str(port), str(share), log]

    def start():
        process = subprocess.Popen(command)
        while not done.is_set():
            assert process.poll() is None, f"the stub server ended with {process.returncode}"
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                break
            except httpx.TransportError:
                assert process.poll() is None, "the server did not start"
                time.sleep(0.02)
        return process

    process = start()

    def kill_again_and_again():
        nonlocal process
        for number in range(1, num_kills + 1):
            goal = num_threads * number // (num_kills + 1)
            while not done.is_set() and not (journal.exists() and journal.read_bytes().count(b"\n") > goal):
                time.sleep(0.005)
            if done.is_set():
                return
            process.kill()
            process.wait()
            kills.append(goal)
            process = start()

    killer = threading.Thread(target=kill_again_and_again)
    killer.start()
    try:
        grade(source, output, [port], timeout_s=stub_server.CLIENT_TIMEOUT_S, retries=12)
    finally:
        done.set()
        killer.join()
        process.kill()
        process.wait()
    found = threads.read(output)
    assert found == [threads.expected(record) for record in made]  # all, in order, none twice
    assert len(kills) == num_kills
    return kills, Counter(log.read_text().split("\n")[:-1] if log.exists() else [])


@pytest.mark.parametrize("share", [0.01, 0.03, 0.1])
def test_a_thousand_threads_survive_ten_kills_and_faulty_answers(tmp_path, monkeypatch, share):
    monkeypatch.setattr("steerlm_nemo.client.pool.FIRST_PAUSE_S", 0.05)
    kills, faults = survive(tmp_path, num_threads=1000, num_kills=10, share=share)
    print(f"{share:.0%}: 1000 of 1000 threads, {len(kills)} kills, faults {dict(faults)}")
    assert sum(faults.values()) > 300 * share


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("localhost", "'localhost' is not HOST:PORT"),
        ("a:1,b", "'b' is not HOST:PORT"),
        ("a:99999", "is not HOST:PORT"),
        (":80", "is not HOST:PORT"),
        ("", "is not HOST:PORT"),
    ],
)
def test_endpoints_that_are_none_are_named(text, message):
    with pytest.raises(InputError, match=message):
        parse_endpoints(text)
    assert parse_endpoints("a:1424, b:1425") == [("a", 1424), ("b", 1425)]


def test_a_server_named_twice_is_refused():
    with pytest.raises(InputError, match="names a server twice"):
        ServerPool([("a", 1), ("a", 1)])


def test_the_command_takes_endpoints(tmp_path):
    made = threads.records(10)
    source = threads.write(tmp_path / "in.jsonl", made)
    with live.run_app(stub_server.build_stub()) as one, live.run_app(stub_server.build_stub()) as two:
        arguments = [f"--endpoints=127.0.0.1:{one},127.0.0.1:{two}", f"--input_file_name={source}"]
        arguments += [f"--output_file_name={tmp_path / 'out.jsonl'}", "--soft"]
        result = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "10 records annotated" in result.stdout and "turns/s" in result.stderr
    compared = json.loads((tmp_path / "out.jsonl.comparison.json").read_text())
    assert compared["attributes"]["quality"]["num_turns"] == 10
