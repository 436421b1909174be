"""A wrong record never ends in a traceback: every script that reads records, against every kind of wrong record.

Each script gets a file of three lines, of which the second is wrong. It must refuse the file or count the reject, and
end with a message. Scripts run in this process, as a process for each of thousands of records would take an hour.
"""

from __future__ import annotations

import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import live
import pytest
import stub_server
from trees import simple_tree

from steerlm_nemo.model_kind import STEERLM, SteerLMFormat
from steerlm_nemo.template import EXTRA_ID_TEMPLATE
from steerlm_nemo.toy.world import held_out_prompts

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
QUESTION = next(iter(held_out_prompts(1)))["conversations"][0]["value"]

CHAT = {
    "conversations": [
        {"value": "Hi", "from": "User", "label": None, "lang": "en"},
        {"value": "Yes.", "from": "Assistant", "label": "quality:3", "gt_label": "quality:4"},
    ],
    "tree_id": "t",
    "system": "SYS.\n\n",
    "mask": "User",
    "type": "TEXT_TO_VALUE",
}
PLAIN = {key: CHAT[key] for key in ("conversations", "mask")}  # of somebody else: it has neither system nor type
ANSWER = {
    "prompt": QUESTION,
    "system": "SYS.",
    "attributes": {"quality": 0, "toxicity": 3},
    "swept": "quality",
    "prompt_number": 0,
    "response": "Yes.",
}
MESSAGE = {"message_id": "m", "parent_id": None, "message_tree_id": "m", "text": "Hi", "role": "prompter", "lang": "en"}
RATED = {"prompt": "a", "response": "b"} | dict.fromkeys(
    ("helpfulness", "correctness", "coherence", "complexity", "verbosity"), 3
)
GRADED_ANSWER = {**ANSWER, **CHAT}
ASKED = {"prompt": "Hi", "attributes": {"quality": 1}, "system": "SYS."}
TRANSCRIPT = "\n\nHuman: Hi\n\nAssistant: Yes."
TEXT = "<extra_id_0>System\nS\n<extra_id_1>User\nHi\n<extra_id_1>Assistant\nYes.\n"

TOKENIZER = "--library=sentencepiece --model_file={tokenizer}"
PREPROCESS = "--input_file={source} --output_file_prefix={out}"
# Name, script, a record that it can read, its arguments.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "preprocessing trees": ("preprocessing", simple_tree("t"), PREPROCESS),
    "preprocessing messages": ("preprocessing", MESSAGE, PREPROCESS),
    "preprocessing helpsteer": ("preprocessing", RATED, PREPROCESS),
    "preprocessing helpsteer2": (
        "preprocessing",
        {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 1},
        PREPROCESS,
    ),
    "preprocessing hh-rlhf": ("preprocessing", {"chosen": TRANSCRIPT, "rejected": TRANSCRIPT + "!"}, PREPROCESS),
    "preprocessing cvalues": (
        "preprocessing",
        {key: "a" for key in ("prompt", "pos_resp", "neg_resp", "pos_type", "neg_type")},
        PREPROCESS,
    ),
    "preprocessing instruction": ("preprocessing", {"instruction": "a", "input": "b", "output": "c"}, PREPROCESS),
    "preprocessing templated": ("preprocessing", {"text": TEXT, "label": [-100.0] * 4 + [1.0] * 5}, PREPROCESS),
    "preprocessing chat": ("preprocessing", PLAIN, PREPROCESS),
    "preprocessing with a second file": (
        "preprocessing",
        {**MESSAGE, "labels": {"quality": {"value": 1}}},
        "--input_file={good} --output_file_prefix={out} --labels_from={source}",
    ),
    "data_clean": ("data_clean", CHAT, "--dataset_file={source} --output_file={out} " + TOKENIZER),
    "data_clean that trims": (
        "data_clean",
        CHAT,
        "--dataset_file={source} --output_file={out} --seq_len=8 --trim_turns " + TOKENIZER,
    ),
    "show_mask": ("show_mask", CHAT, "--dataset_file={source} --line 2 " + TOKENIZER),
    "inspect_data": ("inspect_data", CHAT, "{source} --model_file={tokenizer} --html={out}.html --json={out}.json"),
    "inspect_data of trees": ("inspect_data", simple_tree("t"), "{source} --model_file={tokenizer} --json={out}.json"),
    "build_sft_data": ("build_sft_data", CHAT, "--input_file={source} --output_file={out} --messages_file={out}.m"),
    "process_to_regression_format": (
        "process_to_regression_format",
        CHAT,
        "--input_file={source} --output_file={out}",
    ),
    "make_tiny_llama": ("make_tiny_llama", simple_tree("t"), "--trees_file={source} --output_dir={out}"),
    "plan_steering": ("plan_steering", CHAT, "--prompts_file={source} --output_file={out}"),
    "plan_steering of responses": ("plan_steering", ANSWER, "--responses_file={source} --output_file={out}"),
    "report": (
        "report",
        CHAT,
        "--graded_file={source} --graded_responses_file={good_answers} --schema=toy6 --output_dir={out}",
    ),
    "report of responses": (
        "report",
        ANSWER,
        "--graded_file={good} --responses_file={source} --schema=toy6 --output_dir={out}",
    ),
    "report of graded responses": (
        "report",
        GRADED_ANSWER,
        "--graded_file={good} --graded_responses_file={source} --schema=toy6 --output_dir={out}",
    ),
    "attribute_annotate": (
        "attribute_annotate",
        CHAT,
        "--input_file_name={source} --output_file_name={out} --port_num={value_port} --only_missing --retries=0",
    ),
    "steered_inference": (
        "steered_inference",
        ASKED,
        "--input_file={source} --output_file={out} --port_num={steerlm_port} --retries=0",
    ),
}
# They read no record but those they make, or none at all; train_gpt_sft's reading is in test_malformed.py.
OTHERS = {
    *("convert_hf_llama_to_nemo", "convert_nemo_to_hf_llama", "inspect_nemo", "megatron_gpt_eval", "make_toy_world"),
    *("demo", "flow", "train_gpt_sft"),
}


def deep(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


RAW = {
    "a list": b"[]",
    "null": b"null",
    "nothing": b"{}",
    "cut off": b'{"a": ',
    "no UTF-8": b'{"a": "\xff"}',
    "NaN": b'{"a": NaN}',
    "too deep": deep(100_000),
}
VALUES = (None, 7, 1e999, "", "\ud800", "x:y", [], {}, [None], {"a": [1]})


def wrong(record: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The record with each of its values, however far inside, left out and replaced by values of every kind."""
    text = json.dumps(record)

    def places(value: Any, path: tuple[Any, ...]) -> Iterator[tuple[Any, ...]]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            yield (*path, key)
            yield from places(inner, (*path, key))

    for path in places(record, ()):
        for value in ("left out", *VALUES, "deep", "nearly too deep"):
            changed = json.loads(text)
            inside = changed
            for key in path[:-1]:
                inside = inside[key]
            if value == "left out":
                del inside[path[-1]]
            else:
                inside[path[-1]] = value
            raw = json.dumps(changed).encode()
            raw = raw.replace(b'"deep"', deep(200)).replace(b'"nearly too deep"', deep(sys.getrecursionlimit() - 150))
            yield f"{'.'.join(map(str, path))} {'left out' if value == 'left out' else f'= {value!r}'}", raw


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, small_model: Path) -> Iterator[dict[str, object]]:
    folder = tmp_path_factory.mktemp("good")
    good = {"good": CHAT, "good_answers": GRADED_ANSWER}
    for name, record in good.items():
        (folder / name).write_text(json.dumps(record) + "\n")
    steerlm = SteerLMFormat(EXTRA_ID_TEMPLATE, stub_server.FORMAT.schema, STEERLM)
    with (
        live.run_app(stub_server.build_stub()) as value_port,
        live.run_app(stub_server.build_stub(served=steerlm)) as steerlm_port,
    ):
        yield {
            **{name: folder / name for name in good},
            **{"tokenizer": small_model, "value_port": value_port, "steerlm_port": steerlm_port},
        }


@pytest.fixture
def run(given, tmp_path, monkeypatch, capsys):
    """A script on a file of a good line, this one, and another good one: its exit code and what it said."""

    def run_it(case: str, raw: bytes) -> tuple[object, str]:
        script, good, arguments = CASES[case]
        source = tmp_path / "in.jsonl"
        first = {**good, "message_id": "m1"} if good.get("message_id") else good
        source.write_bytes(b"\n".join([json.dumps(first).encode(), raw, json.dumps(first).encode()]) + b"\n")
        for path in tmp_path.glob("out*"):
            if path.is_file():
                path.unlink()
        places = {**given, "source": source, "out": tmp_path / "out"}
        monkeypatch.setattr(sys, "argv", [script, *arguments.format(**places).split(" ")])
        limit = sys.getrecursionlimit()
        code: object = 0
        try:
            runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        finally:
            sys.setrecursionlimit(limit)
        said = capsys.readouterr()
        return code or 0, said.out + said.err

    return run_it


def test_every_script_that_reads_records_is_here() -> None:
    assert {path.stem for path in SCRIPTS.glob("*.py")} <= {script for script, _, _ in CASES.values()} | OTHERS


@pytest.mark.parametrize("case", CASES)
def test_a_line_that_is_no_record_is_refused_or_counted(run, case: str) -> None:
    for name, raw in RAW.items():
        code, said = run(case, raw)
        counted = re.search(r"\b1 rejected|rejected +1\b", said)
        assert code != 0 or counted, f"{name}: exit code {code}, {said}"


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_value_anywhere_ends_in_no_traceback(run, case: str) -> None:
    for name, raw in wrong(CASES[case][1]):
        try:
            code, said = run(case, raw)
        except Exception as err:
            raise AssertionError(f"{name} ended in a traceback: {raw[:200]!r}") from err
        assert "Traceback" not in said, name
        if code:
            assert "error: " in said or "BELOW THE BAR" in said, f"{name}: {said}"
