"""What a step writes, the next step reads: every writer's output through every reader.

A reader takes all records of a file, accounts for each, or refuses the file with the name of the tool that it is for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import live
import pytest
import stub_server
from in_process import Ended, run_script
from trees import labels, simple_tree

from steerlm_nemo.attributes import HELPSTEER5, NEMO12_LANG
from steerlm_nemo.client.pool import ServerPool
from steerlm_nemo.conversation import TEXT_TO_VALUE, VALUE_TO_TEXT
from steerlm_nemo.model_kind import STEERLM, SteerLMFormat
from steerlm_nemo.record_report import told_schema
from steerlm_nemo.template import EXTRA_ID_TEMPLATE, ChatTemplate

TRANSCRIPT = "\n\nHuman: Hi {}\n\nAssistant: Yes."
CHAT_TURNS = [{"from": "human", "value": "Hi {}"}, {"from": "gpt", "value": "Yes.", "label": "quality:3"}]
MESSAGES = [{"role": "user", "content": "Hi {}"}, {"role": "assistant", "content": "Yes.", "label": {"quality": 3}}]
TEXT = "<extra_id_0>System\nS\n<extra_id_1>User\nHi {}\n<extra_id_1>Assistant\nYes.\n<extra_id_2>"
PAIR_OF_VALUES = {"prompt": "Hi {}", "pos_resp": "a", "neg_resp": "b", "pos_type": "c", "neg_type": "d"}
# A row of each source; {} is a number.
SOURCES: dict[str, dict[str, Any]] = {
    "messages": {"messages": MESSAGES},
    "chat": {"conversations": CHAT_TURNS},
    "helpsteer": {"prompt": "Hi {}", "response": "Yes.", **dict.fromkeys(HELPSTEER5.names, 3)},
    "helpsteer2-preference": {"prompt": "Hi {}", "response_1": "a", "response_2": "b", "preference_strength": -2},
    "hh-rlhf": {"chosen": TRANSCRIPT, "rejected": TRANSCRIPT + "!"},
    "cvalues": PAIR_OF_VALUES,
    "pairs": {"prompt": "Hi {}", "chosen": "a", "rejected": "b"},
    "instruction": {"instruction": "Do {}", "input": "", "output": "c"},
    "prompt-response": {"prompt": "Hi {}", "response": "b"},
    "text-output": {"text": "Hi {}", "output": "b"},
    "templated": {"text": TEXT, "label": [-100.0] * 4 + [1.0] * 5},
}
NUM_ROWS = 3


def rows(source: str) -> list[dict[str, Any]]:
    if source == "oasst-trees":
        return [simple_tree(f"t{i}") for i in range(NUM_ROWS)]
    if source == "oasst-messages":
        ids = [(f"q{i}", f"a{i}") for i in range(NUM_ROWS)]
        return [
            {"message_id": own, "parent_id": parent, "message_tree_id": tree, "text": own, "role": role, "lang": "en"}
            | {"labels": labels(quality=1) if parent else None}
            for question, reply in ids
            for own, parent, tree, role in (
                (question, None, question, "prompter"),
                (reply, question, question, "assistant"),
            )
        ]
    return [json.loads(json.dumps(SOURCES[source]).replace("{}", str(i))) for i in range(NUM_ROWS)]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ok(script: str, *arguments: object) -> None:
    ended = run_script(script, *arguments)
    assert ended.code == 0, f"{script}: {ended.said}"


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, int]]:
    steerlm = SteerLMFormat(EXTRA_ID_TEMPLATE, stub_server.FORMAT.schema, STEERLM)

    def generate(pool: ServerPool, prompts: list[str], home: int = 0, **sampling: object) -> SimpleNamespace:
        """The stub grades only."""
        return SimpleNamespace(completions=["Yes.\n"] * len(prompts))

    with (
        mock.patch.object(ServerPool, "generate", generate),
        live.run_app(stub_server.build_stub()) as value,
        live.run_app(stub_server.build_stub(served=steerlm)) as steering,
    ):
        yield {"value": value, "steerlm": steering}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, small_model: Path, ports: dict[str, int]) -> dict[str, Path]:
    """A file of every writer, by what wrote it."""
    folder = tmp_path_factory.mktemp("written")
    files: dict[str, Path] = {}
    for source in ("oasst-trees", "oasst-messages", *SOURCES):
        for kind in (TEXT_TO_VALUE, VALUE_TO_TEXT):
            prefix = folder / f"{source}-{kind}"
            path = write(folder / f"{source}.jsonl", rows(source))
            split = ["--split_ratio=1.0", f"--type={kind}"]
            ok("preprocessing", f"--input_file={path}", f"--output_file_prefix={prefix}", *split)
            files[f"preprocessing {source} {kind}"] = Path(f"{prefix}_train.jsonl")
    graded = files[f"preprocessing oasst-trees {TEXT_TO_VALUE}"]
    wrong = write(folder / "wrong.jsonl", [*rows("messages"), {"messages": 7}])
    ok("preprocessing", f"--input_file={wrong}", f"--output_file_prefix={folder}/w")
    files |= {"rejects": folder / "w.rejects.jsonl", "report": folder / "w.report.json"}

    def made(name: str, script: str, *arguments: object) -> Path:
        files[name] = folder / f"{name.replace(' ', '-')}.jsonl"
        ok(script, *(str(argument).format(out=files[name]) for argument in arguments))
        return files[name]

    flags = ["--output_file={out}", "--library=sentencepiece", f"--model_file={small_model}"]
    made("data_clean", "data_clean", f"--dataset_file={graded}", *flags)
    to_servers = ["--output_file_name={out}", f"--port_num={ports['value']}", "--retries=0"]
    annotated = made("annotate keep", "attribute_annotate", f"--input_file_name={graded}", *to_servers)
    v2t = ["--output_type=VALUE_TO_TEXT", "--soft"]
    made("annotate V2T", "attribute_annotate", f"--input_file_name={graded}", *to_servers, *v2t)
    messages = folder / "sft-messages.jsonl"
    both = ["--output_file={out}", f"--messages_file={messages}"]
    made("build_sft_data", "build_sft_data", f"--input_file={annotated}", *both)
    files["build_sft_data messages"] = messages
    made("regression", "process_to_regression_format", f"--input_file={graded}", "--output_file={out}")
    planned = made("plan", "plan_steering", f"--prompts_file={graded}", "--output_file={out}", "--num_prompts=1")
    asked = write(folder / "asked.jsonl", [json.loads(line) for line in planned.read_text().splitlines()][:3])
    answered = made(
        "steered", "steered_inference", f"--input_file={asked}", "--output_file={out}", f"--port_num={ports['steerlm']}"
    )
    made("plan of responses", "plan_steering", f"--responses_file={answered}", "--output_file={out}")
    return files


READERS = {
    "preprocessing": "--input_file={source} --output_file_prefix={out} --split_ratio=1.0",
    "data_clean": "--dataset_file={source} --output_file={out} --library=sentencepiece --model_file={model}",
    "build_sft_data": "--input_file={source} --output_file={out}",
    "process_to_regression_format": "--input_file={source} --output_file={out}",
    "inspect_data": "{source} --json={out}",
    "show_mask": "--dataset_file={source} --model_file={model}",
    "attribute_annotate": "--input_file_name={source} --output_file_name={out} --port_num={value} --retries=0",
    "steered_inference": "--input_file={source} --output_file={out} --port_num={steerlm} --retries=0",
    "plan_steering": "--prompts_file={source} --output_file={out} --num_prompts=1",
    "report": "--graded_file={source} --graded_responses_file={source} --output_dir={out}",
}


@pytest.fixture
def read(written: dict[str, Path], tmp_path: Path, small_model: Path, ports: dict[str, int]):
    def run(writer: str, reader: str) -> Ended:
        places = {"source": written[writer], "out": tmp_path / "out", "model": small_model, **ports}
        return run_script(reader, *READERS[reader].format(**places).split())

    return run


def count_of(ended: Ended) -> int | None:
    """How many records a reader says that it accounted for; None where it says no such thing."""
    for pattern in (r"(\d+) read = ", r"records read +(\d+)", r"(\d+) records annotated", r"(\d+) responses written"):
        if found := re.search(pattern, ended.out):
            return int(found[1])
    return None


CHAT_WRITERS = [f"preprocessing {source} {kind}" for source in ("oasst-trees", "oasst-messages", *SOURCES)
                for kind in (TEXT_TO_VALUE, VALUE_TO_TEXT)]  # fmt: skip
CHAT_WRITERS += ["data_clean", "annotate keep", "annotate V2T", "build_sft_data", "plan of responses"]
OTHER_WRITERS = ["rejects", "report", "build_sft_data messages", "regression", "plan", "steered"]
CHAT_READERS = [reader for reader in READERS if reader not in ("steered_inference", "report")]


def test_every_writer_is_here(written: dict[str, Path]) -> None:
    assert {*CHAT_WRITERS, *OTHER_WRITERS} == written.keys()


@pytest.mark.parametrize("reader", READERS)
def test_every_record_is_accounted_for_or_the_file_is_refused_with_its_tool(
    reader: str, written: dict[str, Path], read: Any, tmp_path: Path
) -> None:
    for writer in (*CHAT_WRITERS, *OTHER_WRITERS):
        for old in tmp_path.glob("out*"):
            old.unlink() if old.is_file() else [path.unlink() for path in old.iterdir()]
        ended = read(writer, reader)
        where = f"{writer} -> {reader}: {ended.said}"
        num_lines = len(written[writer].read_text().splitlines())
        if ended.code == 0:
            assert count_of(ended) in (None, num_lines), where
            continue
        assert "error: " in ended.err and str(written[writer]) in ended.err, where
        message = ended.err[ended.err.index("error: ") :]
        strengths = "helpsteer2" in writer and "process_to_regression_format" in message
        # Nothing in it was graded, or is to be learnt: sound records that a step has no use for.
        no_use = f" 0 written + {num_lines} filtered + 0 rejected" in message or "no turn has both" in message
        no_use = no_use or "the last message must be the user's; the model writes the assistant's" in message
        named = re.search(r"scripts/\w+\.py|a reject file\?|one value over several lines\?", message)
        assert strengths or no_use or named, where


@pytest.mark.parametrize("writer", [writer for writer in CHAT_WRITERS if "helpsteer2" not in writer])
def test_what_is_cleaned_and_trained_on_is_what_was_written(
    writer: str, written: dict[str, Path], read: Any, tmp_path: Path, small_tokenizer: Any
) -> None:
    from steerlm_nemo.training.datasets.chat import ChatDataset

    ended, lines = read(writer, "data_clean"), written[writer].read_text().splitlines()
    if ended.code == 3:  # a value model does not learn from turns that nobody graded
        assert "no target: every token is masked" in ended.err and '"label": "' not in written[writer].read_text()
        return
    assert ended.code == 0, ended.said
    assert (tmp_path / "out").read_text().splitlines() == lines
    schema = told_schema(written[writer]) or NEMO12_LANG
    dataset = ChatDataset(written[writer], small_tokenizer, ChatTemplate(), 4096, 1, None, schema)
    assert len(dataset) == len(lines)
