"""However large or odd the input, a message stays a few lines, with its place; and no reading error is a traceback."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from in_process import Ended, run_script

from steerlm_nemo.attributes import AttributeSchema, load_schema
from steerlm_nemo.config import load_config
from steerlm_nemo.errors import MOST_CHARACTERS, InputError, RecordError, SteerLMError, clipped, listed, shown
from steerlm_nemo.records import Accounting, RecordRef, require_file

MOST_BYTES = 4096  # of one message
BIG = "x" * 1_000_000
MANY = {f"key{i}": i for i in range(10_000)}


def deep(depth: int) -> Any:
    value: Any = "end"
    for _ in range(depth):
        value = {"a": [value]}
    return value


def chat(*turns: dict[str, Any], **further: Any) -> dict[str, Any]:
    given = turns or ({"from": "User", "value": "Hi"}, {"from": "Assistant", "value": "Yes.", "label": "quality:3"})
    return {"conversations": [*given], "system": "S", "mask": "User", "type": "TEXT_TO_VALUE", **further}


def turn(**changes: Any) -> dict[str, Any]:
    return {"from": "Assistant", "value": "Yes.", "label": "quality:3", **changes}


def with_turn(**changes: Any) -> dict[str, Any]:
    return chat({"from": "User", "value": "Hi"}, turn(**changes))


LARGE: dict[str, list[Any]] = {
    "10,000 keys": [MANY],
    "10,000 keys beside": [chat(**MANY)],
    "10,000 keys in a turn": [with_turn(**MANY)],
    "a key of 1 MB": [{BIG: 1}, chat(**{BIG: 1})],
    "a type of 1 MB": [chat(type=BIG)],
    "a label of 1 MB": [with_turn(label=f"{BIG}:1")],
    "a value of 1 MB": [with_turn(label=f"quality:{BIG}")],
    "10,000 attributes": [with_turn(label=",".join(f"k{i}:{i % 5}" for i in range(10_000)))],
    "10,000 unknown attributes": [with_turn(label=f"k{i}:3") for i in range(2_000)],
    "a speaker of 1 MB": [with_turn(**{"from": BIG})],
    "deep": [deep(150), chat(type=deep(150)), with_turn(label=deep(150))],
    "a list of 10,000": [chat(system=[*MANY])],
    "10,000 turns that are none": [{**chat(), "conversations": [*MANY]}],
    "1,000 languages": [with_turn(lang=f"l{i}", label=f"quality:3,lang:l{i}") for i in range(1_000)],
    "1,000 lines that differ": [{f"odd{i}": i} for i in range(1_000)],
}
READERS = {
    "preprocessing": "--input_file={source} --output_file_prefix={out}",
    "preprocessing again": "--input_file={source} --output_file_prefix={out} --format=messages",
    "data_clean": "--dataset_file={source} --output_file={out} --library=sentencepiece --model_file={model}",
    "build_sft_data": "--input_file={source} --output_file={out} --messages_file={out}.m",
    "process_to_regression_format": "--input_file={source} --output_file={out}",
    "inspect_data": "{source}",
    "show_mask": "--dataset_file={source} --model_file={model}",
    "plan_steering": "--prompts_file={source} --output_file={out}",
    "report": "--graded_file={source} --graded_responses_file={source} --output_dir={out}",
}


@pytest.fixture
def run(tmp_path: Path, small_model: Path) -> Callable[..., Ended]:
    def run(reader: str, source: Path) -> Ended:
        places = {"source": source, "out": tmp_path / "out", "model": small_model}
        return run_script(reader.split()[0], *READERS[reader].format(**places).split())

    return run


def messages(said: str) -> list[str]:
    """Each error, warning or summary; progress bars are none."""
    return ["".join(part) for part in said.replace("\r", "\n").split("\n") if "it/s" not in part and "|" not in part]


@pytest.mark.parametrize("reader", READERS)
def test_no_message_prints_everything(reader: str, run: Callable[..., Ended], tmp_path: Path) -> None:
    for name, records in LARGE.items():
        if reader == "show_mask" and "1 MB" in name:
            continue  # a record that can be shown is shown, which takes its time
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        ended = run(reader, source)
        assert "Traceback" not in ended.said, name
        error = ended.err[ended.err.find("error: ") :] if "error: " in ended.err else ""
        assert len(error.encode()) <= MOST_BYTES, f"{name}: {error[:2000]}"
        if reader != "show_mask":  # whose work it is to show a whole record
            longest = max(messages(ended.said), key=len)
            assert len(longest.encode()) <= MOST_BYTES, f"{name}: {longest[:2000]}"
        if ended.code and reader.startswith(("data_clean", "build", "process", "preproc")):
            assert f"{source}:1: " in error or "unknown shape" in error, f"{name}: {error}"


def test_training_tells_each_reason_once(tmp_path: Path, small_tokenizer: Any) -> None:
    from steerlm_nemo.attributes import HELPSTEER5
    from steerlm_nemo.template import ChatTemplate
    from steerlm_nemo.training.datasets.chat import ChatDataset

    for records in LARGE.values():
        source = tmp_path / "in.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        with pytest.raises(SteerLMError) as refused:
            ChatDataset(source, small_tokenizer, ChatTemplate(), 256, 16, None, HELPSTEER5)
        assert len(str(refused.value).encode()) <= MOST_BYTES
        assert f"{source}:1" in str(refused.value)
    many = [with_turn(label="quality:3")] * 30 + [with_turn(label=f"odd{i}:3") for i in range(40)]
    source.write_text("".join(json.dumps(record) + "\n" for record in many))
    with pytest.raises(InputError) as refused:
        ChatDataset(source, small_tokenizer, ChatTemplate(), 256, 16, None, HELPSTEER5)
    told = str(refused.value).split("\n")
    assert "70 of 70 records cannot be used" in told[0]
    assert told[1].startswith("  30 records: unknown attribute 'quality'") and told[1].endswith(f"{source}:1 turn 1)")
    assert sum("unknown attribute 'quality'" in line for line in told) == 1
    assert told[9] == "  and 33 more, for 33 other reasons"


def test_what_is_shortened_says_by_how_much_and_keeps_its_end() -> None:
    assert listed(f"k{i}" for i in range(5_000)).endswith("k18, k19 and 4,980 more")
    assert shown([*range(5_000)]).endswith("18, 19 and 4,980 more]")
    assert shown({i: i for i in range(21)}).endswith("and 1 more}")
    assert listed(["a", "b"]) == "a, b" and shown([1, 2]) == "[1, 2]" and shown("a") == "'a'"
    error = InputError(f"{BIG} is wrong. Do this next.")
    assert len(str(error)) < MOST_CHARACTERS + 100 and str(error).endswith("Do this next.")
    assert clipped("abc", 3) == "abc"
    record = RecordError(RecordRef("f", 3), BIG, 2)
    assert str(record).startswith("f:3 turn 2: x") and len(record.reason) < 1200


def test_a_reason_that_many_records_have_is_told_once_with_the_first_place(tmp_path: Path) -> None:
    records = Accounting.beside(tmp_path / "out")
    with records:
        for line in (9, 3, 7):
            records.rejected(RecordRef("f.jsonl", line), f"turn {line}: 'value' must be a string: {line}", b"")
        for line in range(1_000):
            records.rejected(RecordRef("f.jsonl", 100 + line), f"odd {line}", b"")
    told = records.summary()
    assert "('value' must be a string: 3; odd 0: 1; " in told and "and 981 more)" in told
    assert "The first one: f.jsonl:3: turn 3: 'value' must be a string: 3; rejected records are in" in told


@pytest.mark.parametrize(
    "content", ["[" * 100_000, BIG, "name: " + BIG, json.dumps(MANY), json.dumps({**MANY, "attributes": 1})]
)
def test_a_schema_file_of_any_size_is_one_message(tmp_path: Path, content: str) -> None:
    (tmp_path / "own.yaml").write_text(content)
    with pytest.raises(SteerLMError) as refused:
        load_schema(str(tmp_path / "own.yaml"))
    assert len(str(refused.value)) <= MOST_BYTES
    with pytest.raises(SteerLMError) as refused:
        AttributeSchema.from_dict({"name": BIG, "attributes": [{"name": BIG, "maximum": -1}], "languages": [BIG]})
    assert len(str(refused.value)) <= MOST_BYTES


# --- "is a file" is not "can be read" ---------------------------------------------------------------------------


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(path.parent)  # a socket's name may not be long
        server.bind(path.name)


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (Path.mkdir, "is a directory"),
    "a broken link": (lambda path: path.symlink_to("gone"), r"no such file \(a link to gone, which is not there\)"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "cannot be read: Too many levels"),
    "a socket": (make_socket, "is no regular file but a socket"),
    "a pipe": (os.mkfifo, "is no regular file but a pipe; save its content to a file first"),
    "a disk that fails": (lambda path: path.symlink_to("/proc/self/mem"), "cannot be read: Input/output error"),
    "nothing": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_source_that_cannot_be_read_is_one_message(
    kind: str, run: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make, message = UNREADABLE[kind]
    source = tmp_path / "in.jsonl"
    make(source)
    if kind == "a disk that fails" and not source.exists():
        pytest.skip("needs /proc")
    for reader in READERS:
        if kind == "a directory" and reader.split()[0] in ("preprocessing", "inspect_data"):
            continue  # datasets may be directories
        ended = run(reader, source)
        assert ended.code == 2, f"{reader}: {ended.said}"
        error = ended.err[ended.err.index("error: ") :]
        assert str(source) in error and re.search(message, error), f"{reader}: {error}"


@pytest.mark.parametrize("kind", UNREADABLE)
@pytest.mark.parametrize("key", ["model.data.train_ds.file_path", "model.data.validation_ds.file_path"])
def test_training_says_what_is_wrong_with_its_files_before_it_starts(
    kind: str, key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steerlm_nemo.training.config import check
    from steerlm_nemo.training.methods.sft import SFT

    monkeypatch.chdir(tmp_path)
    make, message = UNREADABLE[kind]
    make(tmp_path / "in.jsonl")
    if kind == "a disk that fails":
        return  # seen when it is read, not when it is opened
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps(chat()))
    files = {f"model.data.{side}.file_path": good for side in ("train_ds", "validation_ds")} | {
        key: tmp_path / "in.jsonl"
    }
    cfg = load_config(
        [f"{name}={path}" for name, path in files.items()] + ["exp_manager.explicit_log_dir=log"], "gpt_sft"
    )
    with pytest.raises(SteerLMError, match=f"{key}: .*in.jsonl.*{message}"):
        check(cfg, {"encoder_seq_length": 64}, SFT)


def test_a_file_that_may_not_be_read_is_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may read everything, so the refusal is the system's in words only."""
    path = tmp_path / "in.jsonl"
    path.touch()

    def refuse(self: Path, *args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="in.jsonl: cannot be read: Permission denied. Check its permissions"):
        require_file(path)


def test_a_name_that_no_file_can_have_is_one_message() -> None:
    for name in ("a\0b", "x" * 5000):
        with pytest.raises(InputError, match="cannot be read|no such file"):
            require_file(name)
