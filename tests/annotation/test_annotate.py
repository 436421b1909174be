import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import live
import pytest
import tiny_world
from hf_engine import HFEngine

from steerlm_nemo.annotation.annotate import annotate
from steerlm_nemo.annotation.thread import AnnotationSettings, annotated
from steerlm_nemo.attributes import Attributes
from steerlm_nemo.client.pool import ServerPool
from steerlm_nemo.conversation import Conversation, RecordRef
from steerlm_nemo.engine.protocol import Failed
from steerlm_nemo.errors import IncompleteError, InputError
from steerlm_nemo.model_kind import STEERLM

SCRIPT = Path(__file__).parents[2] / "scripts" / "attribute_annotate.py"


def run(source, output, port, settings=None, *, retries=2, timeout_s=30.0, concurrency=8, **options):
    with ServerPool([("127.0.0.1", port)], timeout_s, retries, concurrency) as servers:
        return annotate(source, output, servers, settings or AnnotationSettings(), **options)


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(record, **changes):
    """What the trained model must write: it reads its world without error."""
    turns = []
    for turn in record["conversations"]:
        if turn["from"] == "Assistant":
            line = tiny_world.SCHEMA.order(tiny_world.reading(turn["value"])).line
            turn = {**turn, "label": line, "gt_label": turn["label"]}
        turns.append(turn)
    return {**record, "conversations": turns, **changes}


@pytest.mark.parametrize(("batch_size", "concurrency"), [(1, 1), (1, 8), (5, 3)])
def test_every_assistant_turn_is_graded_in_input_order(value_port, chat_file, tmp_path, batch_size, concurrency):
    source, records = chat_file(23)
    summary = run(source, tmp_path / "out.jsonl", value_port, batch_size=batch_size, concurrency=concurrency)
    text = (tmp_path / "out.jsonl").read_text()
    assert text == "".join(json.dumps(expected(record), ensure_ascii=False) + "\n" for record in records)
    left = ["in.jsonl", *(f"out.jsonl{end}" for end in ("", ".comparison.html", ".comparison.json", ".report.json"))]
    assert sorted(path.name for path in tmp_path.iterdir()) == left  # nothing else lies around
    assert summary.num_records == 23
    compared = json.loads((tmp_path / "out.jsonl.comparison.json").read_text())["attributes"]
    assert {key: found["exact_match"] for key, found in compared.items()} == {"quality": 1, "humor": 1, "lang": 1}
    assert "23 records annotated" in summary.text()


def test_labels_that_disagree_show_in_the_closing_comparison(value_port, chat_file, tmp_path):
    source, records = chat_file(6)
    for record in records:
        for turn in record["conversations"]:
            if turn["label"]:
                turn["label"] = "quality:0,humor:0,lang:en"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = run(source, tmp_path / "out.jsonl", value_port)
    truth = [tiny_world.reading(t["value"]) for r in records for t in r["conversations"] if t["from"] == "Assistant"]
    quality = summary.comparison.gradings()["quality"]
    assert quality.num_turns == len(truth)
    assert quality.exact_match == pytest.approx(sum(t["quality"] == 0 for t in truth) / len(truth))
    assert quality.mae == pytest.approx(sum(t["quality"] for t in truth) / len(truth))


def test_line_and_slot_mode_write_the_same_labels(value_port, chat_file, tmp_path):
    source, _ = chat_file(6)
    run(source, tmp_path / "line.jsonl", value_port)
    summary = run(source, tmp_path / "slots.jsonl", value_port, AnnotationSettings(mode="slots"), batch_size=3)
    assert (tmp_path / "line.jsonl").read_bytes() == (tmp_path / "slots.jsonl").read_bytes()
    assert summary.counts["by_slots"] > 0 and summary.counts["by_line"] == 0


def test_turns_all_grades_user_turns_as_the_reference_does(value_port, chat_file, tmp_path):
    source, _ = chat_file(3)
    run(source, tmp_path / "out.jsonl", value_port, AnnotationSettings(turns="all"))
    for record in lines_of(tmp_path / "out.jsonl"):
        for turn in record["conversations"]:
            assert [key for key, _ in Attributes.parse(turn["label"]).items] == ["quality", "humor", "lang"]


def test_later_turns_see_the_grades_given_to_earlier_ones(value_engine, value_port, chat_file, tmp_path):
    source, records = chat_file(12)
    for record in records:
        for turn in record["conversations"]:
            turn["label"] = turn["label"] and "quality:0,humor:0,lang:en"  # must not be what the model is shown
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    seen = []
    add = value_engine.add
    value_engine.add = lambda sample: (seen.append(sample), add(sample))[1]
    try:
        run(source, tmp_path / "out.jsonl", value_port)
    finally:
        value_engine.add = add
    prompts = {value_engine.info.tokenizer.decode(list(sample.prompt_ids)) for sample in seen}
    for record in lines_of(tmp_path / "out.jsonl"):
        first, *later = [turn for turn in record["conversations"] if turn["from"] == "Assistant"]
        for turn in later:
            end = f"{turn['value']}\n\x12"
            assert any(first["value"] + "\n\x12" + first["label"] in p and p.endswith(end) for p in prompts)


def labelled(record, found, settings):
    """The record with these attributes, read and written as the annotator does."""
    return annotated(Conversation.from_record(record, RecordRef("x.jsonl", 1)), found, settings, {}).to_record()


def test_output_type_makes_graded_records_ready_for_the_steerlm_model():
    record = {
        "conversations": [
            {"value": "Hi", "from": "User", "label": "quality:2"},
            {"value": "é", "from": "Assistant", "label": "quality:1,lang:en", "lang": "en"},
            {"value": "?", "from": "User", "label": None},
            {"value": "a", "from": "Assistant"},
        ],
        "tree_id": "t",
        "system": "",
        "type": "TEXT_TO_VALUE",
    }
    grades = {1: Attributes.parse("quality:3"), 3: Attributes.parse("quality:4")}
    kept = labelled(record, grades, AnnotationSettings())
    assert kept["type"] == "TEXT_TO_VALUE"
    assert kept["conversations"] == [
        {"value": "Hi", "from": "User", "label": "quality:2"},
        {"value": "é", "from": "Assistant", "label": "quality:3", "lang": "en", "gt_label": "quality:1,lang:en"},
        {"value": "?", "from": "User", "label": None},
        {"value": "a", "from": "Assistant", "label": "quality:4"},
    ]
    ready = labelled(record, grades, AnnotationSettings(output_type="VALUE_TO_TEXT"))
    assert ready["type"] == "VALUE_TO_TEXT"
    assert ready["conversations"][0] == {"value": "Hi", "from": "User", "label": None, "gt_label": "quality:2"}
    assert list(ready) == list(record)
    assert record["conversations"][0]["label"] == "quality:2"  # the input is not touched


def test_human_labels_survive_a_second_annotation():
    turn = {"value": "a", "from": "Assistant", "label": "quality:3", "gt_label": "quality:1"}
    record = {"conversations": [turn], "system": ""}
    again = labelled(record, {0: Attributes.parse("quality:4")}, AnnotationSettings())
    assert again["conversations"][0] == {
        "value": "a",
        "from": "Assistant",
        "label": "quality:4",
        "gt_label": "quality:1",
    }


def test_process_lang_off_leaves_lang_out(value_port, chat_file, tmp_path):
    source, _ = chat_file(3)
    run(source, tmp_path / "out.jsonl", value_port, AnnotationSettings(process_lang=False))
    labels = [t["label"] for r in lines_of(tmp_path / "out.jsonl") for t in r["conversations"] if t["label"]]
    assert labels and all(label.count(":") == 2 and "lang" not in label for label in labels)


def test_equal_texts_in_different_records_all_stay(value_port, chat_file, tmp_path):
    source, records = chat_file(1)
    source.write_text((json.dumps(records[0]) + "\n") * 5)
    run(source, tmp_path / "out.jsonl", value_port)
    assert len(lines_of(tmp_path / "out.jsonl")) == 5  # the reference keeps one


@pytest.mark.parametrize(("batch_size", "share"), [(1, 0.25), (4, 0.5)])
def test_no_record_is_lost_or_doubled_behind_a_faulty_network(
    value_port, chat_file, tmp_path, fast_retries, batch_size, share
):
    source, records = chat_file(40)
    proxy = live.FaultyProxy(value_port, share, seed=1)
    with live.run_app(proxy.app) as port:
        output = tmp_path / "out.jsonl"
        run(source, output, port, retries=15, timeout_s=3.0, batch_size=batch_size)
    assert sum(proxy.faults.values()) >= 5
    assert lines_of(output) == [expected(record) for record in records]


@pytest.mark.slow
def test_no_record_is_lost_or_doubled_when_the_server_is_killed_again_and_again(chat_file, tmp_path, capfd):
    source, records = chat_file(150)
    with live.open_listener(0) as free:
        port = free.getsockname()[1]
    server = live.ServerProcess(live.model_folder("TEXT_TO_VALUE"), port)
    server.start()
    server.wait_ready()
    done = threading.Event()
    journal = tmp_path / "out.jsonl.progress.jsonl"
    kills = []

    def killer():
        for goal in (20, 60, 100):  # at so many finished records
            while not done.is_set() and not (journal.exists() and journal.read_bytes().count(b"\n") > goal):
                time.sleep(0.01)
            if done.is_set():
                return
            server.kill()
            kills.append(goal)
            server.start()
            server.wait_ready()

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        run(source, tmp_path / "out.jsonl", port, retries=12)
    finally:
        done.set()
        thread.join()
        server.kill()
    assert kills == [20, 60, 100]
    said = capfd.readouterr().err
    assert said.count(f"WARNING: no server answers at http://127.0.0.1:{port}") == said.count("is back") == 3
    assert lines_of(tmp_path / "out.jsonl") == [expected(record) for record in records]


def test_a_killed_run_goes_on_where_it_was(value_engine, value_port, chat_file, tmp_path):
    source, records = chat_file(120)
    command = [sys.executable, SCRIPT, f"--input_file_name={source}", f"--output_file_name={tmp_path / 'out.jsonl'}"]
    command += [f"--port_num={value_port}", "--host=127.0.0.1", "--concurrency=2"]
    journal = tmp_path / "out.jsonl.progress.jsonl"
    for number in (signal.SIGKILL, signal.SIGINT):
        before = journal.read_bytes().count(b"\n") if journal.exists() else 0
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not (journal.exists() and journal.read_bytes().count(b"\n") > before + 15):
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate()
        assert process.returncode == (130 if number == signal.SIGINT else -number)
        assert "Traceback" not in err
        assert not (tmp_path / "out.jsonl").exists()
    with journal.open("ab") as file:
        file.write(b'{"line": 119, "sha')  # torn by the kill
    finished = journal.read_bytes().count(b"\n") - 1
    calls = len(value_engine.calls)
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert lines_of(tmp_path / "out.jsonl") == [expected(record) for record in records]
    assert f"120 records annotated ({finished} of them by an earlier run)" in result.stdout
    turns_left = sum(len(record["conversations"]) // 2 for record in records) - finished
    assert len(value_engine.calls) - calls <= turns_left  # nothing finished was asked again


def test_a_dead_server_stops_the_run_with_exit_code_3_and_keeps_what_is_done(chat_file, tmp_path, fast_retries):
    source, records = chat_file(30)
    output = tmp_path / "out.jsonl"
    engine = live.engine("TEXT_TO_VALUE")
    with live.run_engine(engine) as good:

        class DiesAfter(live.FaultyProxy):
            async def _pass_on(self, request):
                if len(engine.calls) > limit:
                    raise ConnectionResetError
                return await super()._pass_on(request)

        limit = len(engine.calls) + 12
        with live.run_app(DiesAfter(good, share=0).app) as port, pytest.raises(IncompleteError) as err:
            run(source, output, port, retries=2, concurrency=2)
        assert err.value.exit_code == 3
        assert "Run the same command again" in str(err.value) and "of 30 records" in str(err.value)
        assert not output.exists()
        summary = run(source, output, good)
    assert summary.num_resumed > 0
    assert lines_of(output) == [expected(record) for record in records]


def test_records_that_cannot_be_annotated_are_rejected_with_reason_and_exit_code_3(value_port, chat_file, tmp_path):
    source, records = chat_file(8)
    output = tmp_path / "out.jsonl"
    too_long = {**records[0], "conversations": [{"value": "a b " * 300, "from": "Assistant"}]}
    bad = [b"{", json.dumps({"system": "x"}).encode(), b"\xff", json.dumps(too_long).encode()]
    bad.append(b'{"conversations": [{"value": "\\ud800", "from": "Assistant"}], "system": ""}')
    good = [json.dumps(record).encode() for record in records]
    source.write_bytes(b"\n".join([*good[:4], *bad, *good[4:]]) + b"\n\n")
    with pytest.raises(IncompleteError) as err:
        run(source, output, value_port, batch_size=3)
    assert err.value.exit_code == 3 and "5 of 13 records could not be annotated (not JSON: 1; " in str(err.value)
    assert "(the other 8 are kept)" in str(err.value)
    assert not output.exists()
    rejects = lines_of(tmp_path / "out.jsonl.rejects.jsonl")
    assert sorted(reject["where"].rpartition(":")[2] for reject in rejects) == ["5", "6", "7", "8", "9"]
    reasons = " | ".join(reject["reason"] for reject in rejects)
    for expected_reason in (
        "not JSON",
        "'conversations' must be",
        "not UTF-8",
        "context length is 256 tokens",
        "lone surrogate",
    ):
        assert expected_reason in reasons
    summary = run(source, output, value_port, allow_rejected=True)
    assert summary.num_records == summary.num_resumed == 8
    assert lines_of(output) == [expected(record) for record in records]


def test_a_file_of_another_kind_is_not_called_correctable(value_port, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"text": "no chat"}\n' * 3)
    with pytest.raises(IncompleteError) as err:
        run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", value_port)
    said = str(err.value)
    assert "3 of 3 records could not be annotated ('conversations' must be a non-empty list of turns: 3)" in said
    assert "None could be: is this the right file?" in said


def test_a_poisoned_record_costs_its_batch_nothing(value_engine, chat_file, tmp_path, fast_retries):
    source, records = chat_file(9)
    poisoned = records[4]["conversations"][-1]["value"]

    class Poisonable:
        info, counters = value_engine.info, value_engine.counters
        ill: ClassVar[list] = []
        cancel = staticmethod(value_engine.cancel)

        def add(self, sample):
            row = value_engine.add(sample)
            if poisoned + "\n\x12" in self.info.tokenizer.decode(list(sample.prompt_ids)):
                value_engine.cancel(row)
                self.ill.append(Failed(row, RuntimeError("cannot")))
            return row

        def step(self):
            ill, self.ill[:] = list(self.ill), []
            return [*ill, *value_engine.step()]

    with live.run_engine(Poisonable()) as port, pytest.raises(IncompleteError):
        run(source, tmp_path / "out.jsonl", port, batch_size=3, retries=1)
    ill = [i + 1 for i, r in enumerate(records) if poisoned in [t["value"] for t in r["conversations"]]]
    rejects = lines_of(tmp_path / "out.jsonl.rejects.jsonl")
    assert sorted(int(reject["where"].rpartition(":")[2]) for reject in rejects) == ill
    assert "500" in rejects[0]["reason"]


def test_a_steerlm_model_is_refused(value_engine, chat_file, tmp_path):
    source, _ = chat_file(1)
    served = replace(value_engine.info.format, kind=STEERLM)
    steerlm_engine = HFEngine(value_engine.model, value_engine.info.tokenizer, served, "steerlm")
    with (
        live.run_engine(steerlm_engine) as port,
        pytest.raises(InputError, match="is a SteerLM model, which responds at attributes; this needs a value model"),
    ):
        run(source, tmp_path / "out.jsonl", port)


def test_settings_cannot_change_halfway(value_port, chat_file, tmp_path):
    source, _ = chat_file(2)
    source.write_text(source.read_text() + "{\n")
    with pytest.raises(IncompleteError):
        run(source, tmp_path / "out.jsonl", value_port)
    with pytest.raises(InputError, match="turns was 'assistant', now 'all'"):
        run(source, tmp_path / "out.jsonl", value_port, AnnotationSettings(turns="all"))


def command(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("spelling", ["_", "-"])
def test_the_references_flags_are_taken_in_both_spellings(value_port, chat_file, tmp_path, spelling):
    source, records = chat_file(4)
    flags = {
        "batch_size": "2",
        "host": "127.0.0.1",
        "port_num": value_port,
        "input_file_name": source,
        "output_file_name": tmp_path / "out.jsonl",
        "process_lang": "True",
    }
    result = command(*(f"--{name.replace('_', spelling)}={value}" for name, value in flags.items()))
    assert result.returncode == 0, result.stderr
    assert lines_of(tmp_path / "out.jsonl") == [expected(record) for record in records]
    assert "4 records annotated" in result.stdout


def test_compat_grades_every_turn_one_value_at_a_time(value_engine, value_port, chat_file, tmp_path):
    source, records = chat_file(2)
    before = sum(value_engine.calls)
    result = command(
        "--compat=nemo1.23",
        f"--input_file_name={source}",
        f"--output_file_name={tmp_path / 'out.jsonl'}",
        "--host=127.0.0.1",
        f"--port_num={value_port}",
    )
    assert result.returncode == 0, result.stderr
    written = lines_of(tmp_path / "out.jsonl")
    assert all(turn["label"] for record in written for turn in record["conversations"])
    assert sum(value_engine.calls) - before >= 3 * sum(len(record["conversations"]) for record in records)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--input_file_name=/no/such/file"], "no such file"),
        (["--input_file_name=/tmp"], "is a directory"),
        (["--port_num=9"], "no server answers at http://localhost:9"),
        (["--batch_sise=2"], "unrecognized arguments: --batch_sise=2"),
        (["--process_lang=maybe"], "neither True nor False"),
        (["--batch_size=0"], "at least 1"),
        (["--turns=user"], "invalid choice"),
    ],
)
def test_bad_input_gets_one_message_and_no_traceback(value_port, chat_file, tmp_path, arguments, message):
    source, _ = chat_file(1)
    output = tmp_path / "out.jsonl"
    given = [f"--input_file_name={source}", f"--output_file_name={output}", f"--port_num={value_port}", "--retries=0"]
    result = command(*given, *arguments)
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not output.exists()


def test_what_another_input_has_done_is_not_thrown_away(value_port, chat_file, tmp_path):
    source, _ = chat_file(3)
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(source.read_bytes() + b"{\n")
    with pytest.raises(IncompleteError):
        run(broken, tmp_path / "out.jsonl", value_port)
    journal = tmp_path / "out.jsonl.progress.jsonl"
    before = journal.read_bytes()
    other = tmp_path / "other.jsonl"
    other.write_bytes(source.read_bytes().replace(b"User", b"user"))
    with pytest.raises(InputError, match=r"holds 3 records of another input, and none of .*other\.jsonl"):
        run(other, tmp_path / "out.jsonl", value_port)
    assert journal.read_bytes() == before


@pytest.mark.parametrize("content", ["", '{"text": "no chat"}\n'])
def test_a_run_that_graded_nothing_is_no_success(value_port, tmp_path, content):
    (tmp_path / "in.jsonl").write_text(content)
    given = [f"--input_file_name={tmp_path}/in.jsonl", f"--output_file_name={tmp_path}/out.jsonl"]
    result = command(*given, f"--port_num={value_port}", "--host=127.0.0.1", "--allow_rejected")
    assert result.returncode == (3 if content else 2)
    assert ("is this the right file?" if content else "in.jsonl: holds no record") in result.stderr
    assert not (tmp_path / "out.jsonl").exists()
