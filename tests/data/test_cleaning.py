import argparse
import errno
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from in_process import run_script

from steerlm_nemo.attributes import NEMO12_LANG
from steerlm_nemo.checkpoint.template import template_from
from steerlm_nemo.conversation import SYSTEM_PROMPT, TEXT_TO_VALUE, VALUE_TO_TEXT, Conversation, RecordRef
from steerlm_nemo.data.cleaning import (
    NO_MASK_ROLE,
    NO_TARGET,
    TARGET_BEYOND,
    Cleaner,
    clean_file,
)
from steerlm_nemo.data.flags import load_tokenizer
from steerlm_nemo.data.options import Options
from steerlm_nemo.data.preprocessing import preprocess
from steerlm_nemo.data.regression import process_to_regression_format
from steerlm_nemo.data.sft_data import build_sft_data
from steerlm_nemo.data.statistics import AttributeStatistics
from steerlm_nemo.errors import CheckpointError, ConfigError, IncompleteError, InputError, RecordError
from steerlm_nemo.model_kind import STEERLM, SteerLMFormat
from steerlm_nemo.records import Accounting, dump_record
from steerlm_nemo.template import EXTRA_ID_TEMPLATE, ChatTemplate
from steerlm_nemo.tokenizer import SentencePieceTokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "data_clean.py"
LINE = "quality:4,lang:en"


def record(*turns, type=TEXT_TO_VALUE, mask="User", system=SYSTEM_PROMPT):
    """A turn is (role, text) or (role, text, label)."""
    raw = [dict(zip(("from", "value", "label"), turn, strict=False)) for turn in turns]
    return {"conversations": raw, "tree_id": "t", "system": system, "mask": mask, "type": type}


def write(path, records):
    path.write_text("".join(dump_record(r) + "\n" for r in records), encoding="utf-8")
    return path


def kept(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def clean(folder, records, tokenizer, seq_len=256, **options):
    """The records that stay, the accounting and the findings."""
    source = write(folder / "in.jsonl", records)
    counts = Accounting.beside(folder / "out.jsonl", strict=options.pop("strict", False))
    report = options.pop("report", None)
    cleaner = Cleaner(options.pop("template", ChatTemplate()), tokenizer, seq_len, **options)
    findings = clean_file(source, folder / "out.jsonl", cleaner, counts, report)
    return kept(folder / "out.jsonl"), counts, findings


def cli(*args):
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True, timeout=60)


SHORT = record(("User", "Hi"), ("Assistant", "Hello.", LINE))
BEYOND = record(("User", "Hi " * 270), ("Assistant", "Hello.", LINE))
UNGRADED = record(("User", "Hi"), ("Assistant", "Hello."))
NO_USER = record(("Assistant", "Hello.", LINE), ("Assistant", "Hello again.", LINE))
USERS_ONLY = record(("User", "Hi"), ("User", "Hello?"))
LAST_BEYOND = record(
    ("User", "Hi"), ("Assistant", "Hello.", LINE), ("User", "So? " * 200), ("Assistant", "Hello again.", LINE)
)
MARKER_TEXT = record(("User", "Hi <extra_id_2>quality:0\n"), ("Assistant", "Hello.", LINE))
REFERENCE_RUN = [SHORT, BEYOND, UNGRADED, NO_USER, USERS_ONLY, LAST_BEYOND, MARKER_TEXT]


def test_the_reference_run_but_for_the_ungraded_response(tmp_path, llama2_model):
    # The reference keeps UNGRADED and trains on its text (D-09); for us it holds no target.
    tokenizer = SentencePieceTokenizer(llama2_model)
    stay, counts, findings = clean(tmp_path, REFERENCE_RUN, tokenizer, template=EXTRA_ID_TEMPLATE)
    assert stay == [SHORT, USERS_ONLY, LAST_BEYOND, MARKER_TEXT]
    assert dict(counts.reasons) == {TARGET_BEYOND: 1, NO_TARGET: 1, NO_MASK_ROLE: 1}
    assert counts.summary().startswith("7 read = 4 written + 3 filtered + 0 rejected")
    assert findings.counts["records with marker texts in their content"] == 1


def test_compatible_mode_prints_what_the_reference_prints(tmp_path, llama2_model):
    source = write(tmp_path / "in.jsonl", [r for r in REFERENCE_RUN if r is not UNGRADED])
    done = cli(
        *(f"--dataset_file={source}", f"--output_file={tmp_path / 'out.jsonl'}", "--library=sentencepiece"),
        *(f"--model_file={llama2_model}", "--seq_len=256", "--compat=nemo1.23"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0\nremoved 1\nException removed 2\n"
    assert "6 read = 4 written + 2 filtered + 0 rejected" in done.stderr
    assert kept(tmp_path / "out.jsonl") == [SHORT, USERS_ONLY, LAST_BEYOND, MARKER_TEXT]


@pytest.mark.parametrize("type", [TEXT_TO_VALUE, VALUE_TO_TEXT, None])
def test_a_record_stays_exactly_while_training_sees_its_first_target(tmp_path, small_tokenizer, type):
    raw = record(("User", "What is the capital?"), ("Assistant", "Paris", LINE), type=type)
    conversation = Conversation.from_record(raw, RecordRef("x", 1))
    loss_mask = ChatTemplate().render(conversation, small_tokenizer).loss_mask
    first_target = loss_mask.index(1)
    # Training scores mask[1 : seq_len + 1].
    stay, _, _ = clean(tmp_path, [raw], small_tokenizer, seq_len=first_target)
    assert stay == [raw]
    with pytest.raises(IncompleteError):
        clean(tmp_path, [raw], small_tokenizer, seq_len=first_target - 1)


def test_lines_are_written_again_with_default_separators_and_keep_every_key(tmp_path, small_tokenizer):
    raw = {**SHORT, "extra": {"é": [1, 2.5, None]}}
    raw["conversations"][0]["lang"] = "fr"
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(raw, separators=(",", ":")) + "\n\n", encoding="utf-8")
    cleaner = Cleaner(ChatTemplate(), small_tokenizer, 256)
    clean_file(source, tmp_path / "out.jsonl", cleaner, Accounting.beside(tmp_path / "out.jsonl"))
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == json.dumps(raw, ensure_ascii=False) + "\n"


def test_unusable_records_are_rejected_and_the_sums_add_up(tmp_path, small_tokenizer):
    source = tmp_path / "in.jsonl"
    bad = [
        b'{"conversations": [',
        b'{"conversations": [{"value": "\xff"}]}',
        b'{"conversations": []}',
        dump_record(record(("User", "Hi"), ("Assistant", "x", "quality:high"))).encode(),
        dump_record(record(("User", "Hi"), ("Assistant", "x", 4))).encode(),
        dump_record(record(("User", "Hi"), ("Assistant", "x", LINE), type="FOO")).encode(),
        json.dumps(record(("User", "\ud800"), ("Assistant", "x", LINE))).encode(),
    ]
    source.write_bytes(b"\n".join([dump_record(SHORT).encode(), b"", *bad]))
    counts = Accounting.beside(tmp_path / "out.jsonl")
    clean_file(source, tmp_path / "out.jsonl", Cleaner(ChatTemplate(), small_tokenizer, 256), counts)
    assert counts.summary().startswith("8 read = 1 written + 0 filtered + 7 rejected")
    rejects = [json.loads(line) for line in (tmp_path / "out.jsonl.rejects.jsonl").read_text().splitlines()]
    assert [reject["where"] for reject in rejects] == [f"{source}:{number}" for number in range(3, 10)]
    reasons = ["not JSON", "not UTF-8", "non-empty list", "'high'", "'label' must be", "'FOO'", "lone surrogate"]
    for reject, reason in zip(rejects, reasons, strict=True):
        assert reason in reject["reason"]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
def test_a_record_with_a_response_that_is_not_to_be_learnt_is_rejected(tmp_path, small_tokenizer, mark):
    marked, harmless = ({**SHORT, "conversations": [dict(turn) for turn in SHORT["conversations"]]} for _ in range(2))
    marked["conversations"][1] |= mark
    harmless["conversations"][0] |= mark
    stay, counts, _ = clean(tmp_path, [marked, harmless], small_tokenizer)
    assert stay == [harmless]
    assert dict(counts.reasons) == {"not a conversation": 1}


@pytest.mark.parametrize("strengths", [(-3, 2), (2, -1), (1, 2, 0, -2)])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_strengths_of_preference_are_refused_as_a_file_and_not_by_halves(
    tmp_path, small_tokenizer, strengths, num_workers
):
    rows = [
        {"prompt": f"{n}?", "response_1": "a", "response_2": "b", "preference_strength": strength}
        for n, strength in enumerate(strengths)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    preprocess(
        tmp_path / "rows.jsonl",
        tmp_path / "o",
        split_ratio=1.0,
        seed=1,
        options=Options(),
        trees=Accounting.beside(tmp_path / "o"),
    )
    source, output = tmp_path / "o_train.jsonl", tmp_path / "out.jsonl"
    with pytest.raises(InputError, match=r"o_train\.jsonl: its labels are strengths of preference"):
        cleaner = Cleaner(ChatTemplate(), small_tokenizer, 256)
        clean_file(source, output, cleaner, Accounting.beside(output), num_workers=num_workers)
    with pytest.raises(InputError, match="are for scripts/process_to_regression_format.py only"):
        build_sft_data(source, output, Accounting.beside(output), AttributeStatistics())
    assert not output.exists()
    lines = Accounting.beside(output)
    process_to_regression_format(source, output, lines, AttributeStatistics())
    assert lines.counts["written"] == 2 * len(strengths)


def test_strict_stops_at_the_first_unusable_record(tmp_path, small_tokenizer):
    with pytest.raises(RecordError, match=r"in\.jsonl:2"):
        clean(tmp_path, [SHORT, {"conversations": []}], small_tokenizer, strict=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_marker_texts_in_content_are_counted_and_left_in_the_file(tmp_path, small_tokenizer):
    raw = record(("User", "a\x12b\x11c"), ("Assistant", "Hello.", LINE))
    stay, _, findings = clean(tmp_path, [raw, SHORT], small_tokenizer)
    assert stay == [raw, SHORT]
    assert dict(findings.counts) == {
        "records with marker texts in their content": 1,
        "marker texts that training will leave out": 2,
    }


def test_several_processes_give_the_same_bytes_counts_and_rejects(tmp_path, small_tokenizer):
    source = tmp_path / "in.jsonl"
    lines = [dump_record(REFERENCE_RUN[number % len(REFERENCE_RUN)]) for number in range(300)]
    lines[100], lines[200] = "{", dump_record({"conversations": []})
    source.write_text("\n".join(lines) + "\n", encoding="utf-8")
    results = []
    for num_workers in (1, 3):
        output = tmp_path / "out.jsonl"
        counts, seen = Accounting.beside(output), []
        cleaner = Cleaner(ChatTemplate(), small_tokenizer, 256)
        findings = clean_file(source, output, cleaner, counts, None, lambda *one: seen.append(one), num_workers)  # noqa: B023
        results.append((output.read_bytes(), counts.summary(), findings, seen, counts.rejects_path.read_bytes()))
    assert results[0] == results[1]
    assert counts.counts["rejected"] == 2 and len(seen) == 300


def num_tokens(raw, tokenizer):
    return len(ChatTemplate().render(Conversation.from_record(raw, RecordRef("x", 1)), tokenizer).token_ids)


@pytest.mark.parametrize("type", [TEXT_TO_VALUE, VALUE_TO_TEXT])
def test_trimming_keeps_the_most_turns_that_fit_whole(tmp_path, small_tokenizer, type):
    turns = [t for i in range(10) for t in (("User", f"Question {i}"), ("Assistant", f"Response {i}", LINE))]
    raw = record(*turns, type=type)
    whole, first_two = num_tokens(raw, small_tokenizer), num_tokens(record(*turns[:2], type=type), small_tokenizer)
    for seq_len in range(first_two, whole - 1, 37):
        (stay,), _, findings = clean(tmp_path, [raw], small_tokenizer, seq_len, trim_turns=True)
        num_turns = len(stay["conversations"])
        assert stay == {**raw, "conversations": raw["conversations"][:num_turns]}
        assert num_tokens(stay, small_tokenizer) <= seq_len + 1
        longer = {**raw, "conversations": raw["conversations"][: num_turns + 1]}
        assert num_tokens(longer, small_tokenizer) > seq_len + 1
        assert findings.counts["turns trimmed"] == 20 - num_turns
        assert findings.num_tokens == num_tokens(stay, small_tokenizer)


def test_trimming_leaves_the_first_target_even_where_it_is_cut(tmp_path, small_tokenizer):
    raw = record(
        *(("User", "Hi"), ("Assistant", "Hello. " * 100, LINE), ("User", "So?"), ("Assistant", "Bye", LINE)),
        type=VALUE_TO_TEXT,
    )
    (stay,), _, _ = clean(tmp_path, [raw], small_tokenizer, 150, trim_turns=True)
    assert stay["conversations"] == raw["conversations"][:2]


def test_without_trimming_long_records_are_counted_and_kept_whole(tmp_path, small_tokenizer):
    (stay,), _, findings = clean(tmp_path, [LAST_BEYOND], small_tokenizer)
    assert stay == LAST_BEYOND
    assert dict(findings.counts) == {"records longer than seq_len": 1, "turns not whole within seq_len": 2}


def test_a_file_without_a_record_to_train_on_is_an_error_with_a_report(tmp_path, small_tokenizer):
    report = tmp_path / "report.json"
    with pytest.raises(IncompleteError, match="nothing is left to train on at seq_len 256: 2 read = 0 written"):
        clean(tmp_path, [BEYOND, UNGRADED], small_tokenizer, report=report)
    assert not (tmp_path / "out.jsonl").exists()
    assert json.loads(report.read_text())["filtered"] == 2


def test_a_run_that_leaves_nothing_keeps_rejects_and_report_of_the_earlier_one(tmp_path, small_tokenizer):
    source, output, report = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "report.json"
    cleaner = Cleaner(ChatTemplate(), small_tokenizer, 256)
    for content in ([SHORT, {"conversations": []}], [{"conversations": []}], [BEYOND]):
        write(source, content)
        if content[0] is SHORT:
            clean_file(source, output, cleaner, Accounting.beside(output), report)
            names = ("out.jsonl", "report.json", "out.jsonl.rejects.jsonl")
            before = {name: (tmp_path / name).read_bytes() for name in names}
        else:
            with pytest.raises(IncompleteError, match="nothing is left"):
                clean_file(source, output, cleaner, Accounting.beside(output), report)
            assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_the_report_has_the_counts_and_the_template(tmp_path, small_tokenizer):
    report = tmp_path / "report.json"
    _, _, findings = clean(tmp_path, [SHORT, BEYOND, LAST_BEYOND], small_tokenizer, report=report)
    assert json.loads(report.read_text()) == {
        "dataset_file": str(tmp_path / "in.jsonl"),
        "output_file": str(tmp_path / "out.jsonl"),
        "seq_len": 256,
        "trim_turns": False,
        "template": {
            "system_turn_start": "\x00",
            "turn_start": "\x11",
            "label_start": "\x12",
            "end_of_turn": "\n",
            "end_of_name": "\n",
        },
        "read": 3,
        "written": 2,
        "filtered": 1,
        "rejected": 0,
        "reasons": {TARGET_BEYOND: 1},
        "attribute_schema": None,  # nobody told
        "tokens": findings.num_tokens,
        "findings": {"records longer than seq_len": 1, "turns not whole within seq_len": 2},
    }


# --- where the markers come from ---

TEXT_MARKERS = ChatTemplate("<s0>", "<t1>", "<l2>")
FORMAT_YAML = json.dumps({"steerlm": SteerLMFormat(TEXT_MARKERS, NEMO12_LANG, STEERLM).to_dict()})
TOKENS_YAML = "data: {chat_prompt_tokens: {system_turn_start: <s0>, turn_start: <t1>, label_start: <l2>}}"


@pytest.mark.parametrize("config", [FORMAT_YAML, TOKENS_YAML, f"model: {{{TOKENS_YAML}}}"])
@pytest.mark.parametrize("kind", ["yaml", "folder", "nemo", "nemo.gz"])
def test_markers_are_read_from_a_checkpoint_or_a_configuration(tmp_path, config, kind):
    if kind in ("yaml", "folder"):
        (tmp_path / "model_config.yaml").write_text(config)
        path = tmp_path / "model_config.yaml" if kind == "yaml" else tmp_path
    else:
        path = tmp_path / "model.nemo"
        with tarfile.open(path, "w:gz" if kind == "nemo.gz" else "w") as archive:
            for name, content in (("./other.bin", b"\x00"), ("./model_config.yaml", config.encode())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert template_from(path) == TEXT_MARKERS


def test_our_training_config_has_the_default_markers():
    assert template_from(SCRIPT.parents[1] / "nemo_configs" / "gpt_sft.yaml") == ChatTemplate()


def test_a_source_without_markers_is_refused(tmp_path):
    config = tmp_path / "config.yaml"
    for text, error in (
        ("a: [", InputError),
        ("- 1", InputError),
        ("model: {data: {}}", ConfigError),
        ("data: {chat_prompt_tokens: {turn_star: x}}", ConfigError),
    ):
        config.write_text(text)
        with pytest.raises(error):
            template_from(config)
    with pytest.raises(InputError, match="no such file"):
        template_from(tmp_path / "none.yaml")
    with pytest.raises(CheckpointError, match=r"none\.nemo"):
        template_from(tmp_path / "none.nemo")
    with tarfile.open(tmp_path / "empty.nemo", "w"):
        pass
    with pytest.raises(CheckpointError, match=r"empty\.nemo"):
        template_from(tmp_path / "empty.nemo")


# --- the script ---


@pytest.fixture
def arguments(tmp_path, small_model):
    source = write(tmp_path / "in.jsonl", [SHORT, BEYOND])
    return {
        "dataset_file": source,
        "output_file": tmp_path / "out.jsonl",
        "library": "sentencepiece",
        "model_file": small_model,
        "seq_len": 256,
    }


def flags(arguments, dash="_"):
    return [f"--{name.replace('_', dash)}={value}" for name, value in arguments.items()]


@pytest.mark.parametrize("dash", ["_", "-"])
def test_the_script_takes_the_references_flags_in_both_spellings(arguments, dash):
    done = cli(*flags(arguments, dash))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == (
        "records: 2 read = 1 written + 1 filtered + 0 rejected (no target within seq_len: 1)"
    )
    assert kept(arguments["output_file"]) == [SHORT]
    report = json.loads(Path(f"{arguments['output_file']}.report.json").read_text())
    assert (report["read"], report["written"], report["reasons"]) == (2, 1, {TARGET_BEYOND: 1})


def test_trees_are_to_be_preprocessed_first(arguments, tmp_path):
    tree = {"message_tree_id": "1", "prompt": {"message_id": "1", "text": "Hi", "role": "prompter", "replies": []}}
    Path(arguments["dataset_file"]).write_text(json.dumps(tree) + "\n")
    done = cli(*flags(arguments))
    assert done.returncode == 3 and "Check the mask role" not in done.stderr
    assert "(an OpenAssistant tree? Run scripts/preprocessing.py first)" in done.stderr


def test_markers_as_flags_decide_what_fits(arguments, tmp_path):
    long_markers = {name: marker * 40 for name, marker in (("turn_start", "<t1>"), ("label_start", "<l2>"))}
    done = cli(*flags({**arguments, **long_markers}), f"--report={tmp_path / 'report.json'}")
    assert done.returncode == 3
    assert "nothing is left to train on" in done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["template"]["turn_start"] == "<t1>" * 40
    assert cli(*flags(arguments), r"--turn_start=\x11").returncode == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset_file": "none.jsonl"}, "none.jsonl: no such file"),
        ({"dataset_file": "."}, "is a directory"),
        ({"model_file": "none.model"}, "none.model: no such file"),
        ({"output_file": "."}, "is a directory"),
        ({"report": "."}, "is a directory"),
        ({"seq_len": 0}, "--seq_len is 0"),
        ({"template_from": "none.nemo"}, "none.nemo: cannot be opened"),
        ({"turn_start": "a", "compat": "nemo1.23"}, "one of: --template_from, --compat"),
    ],
)
def test_the_script_refuses_bad_arguments_with_one_line(arguments, change, message):
    done = cli(*flags({**arguments, **change}))
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not arguments["output_file"].exists()


def test_sentencepiece_needs_a_model_file(arguments):
    del arguments["model_file"]
    done = cli(*flags(arguments))
    assert done.returncode == 2
    assert "needs --model_file" in done.stderr


def test_a_tokenizer_that_cannot_be_read_is_one_message(arguments, monkeypatch):
    model = arguments["model_file"]

    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match="cannot be read: Permission denied") as refused:
        load_tokenizer(argparse.Namespace(library="sentencepiece", model_file=model, model_name=None), ChatTemplate())
    assert str(refused.value).startswith(str(model))


def test_neither_torch_nor_nemo_is_loaded(arguments):
    program = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'nemo')))"
    )
    done = subprocess.run([sys.executable, "-c", program, SCRIPT, *flags(arguments)], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_hugging_face_tokenizer_folder_is_taken(arguments, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator([], tokenizers.trainers.BpeTrainer(initial_alphabet=alphabet, show_progress=False))
    model.save(str(tmp_path / "tokenizer.json"))
    del arguments["model_file"]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    for flag, source in (("name", tmp_path / "tokenizer.json"), ("file", tmp_path), ("name", tmp_path)):
        done = run_script("data_clean", *flags({**arguments, "library": "huggingface", f"model_{flag}": source}))
        assert done.code == 0, done.said
        assert kept(arguments["output_file"]) == [SHORT]


@pytest.mark.parametrize("script", ["data_clean", "show_mask", "inspect_data"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["library=huggingface", "model_file={model}"],
            "{model} is neither the folder.*--library=sentencepiece --model_",
        ),
        (["library=sentencepiece", "model_file={folder}"], "{folder} is no SentencePiece.*give --model_file={model}"),
        (
            ["library=sentencepiece", "model_file={other}"],
            "{other} is no SentencePiece.*a folder; give --library=huggingf",
        ),
        (["library=sentencepiece", "model_file=x.json"], "x.json is no SentencePiece.*; give --library=huggingface"),
        (["library=sentencepiece", "model_name={folder}"], "--model_name {folder} is of --library=huggingface"),
        (["model_file={model}", "model_name={folder}"], "are two tokenizers; give one of them"),
        (["library=sentencepiece"], "needs --model_file"),
        (["library=huggingface"], "give the tokenizer of the model"),
        (
            ["library=huggingface", "model_name=EleutherAI/gpt-neox-20b"],
            "none is ever fetched unasked.*huggingface-cli",
        ),
        (["library=huggingface", "model_file={folder}/none"], "none: no such file or folder"),
        (["library=huggingface", "model_file={other}"], "cannot load a Hugging Face tokenizer from here"),
    ],
)
def test_a_tokenizer_of_the_other_library_is_refused_and_nothing_is_fetched(
    arguments, tmp_path, small_model, monkeypatch, script, given, message
):
    import socket

    (tmp_path / "other").mkdir()
    monkeypatch.setattr(socket.socket, "connect", lambda *to: pytest.fail(f"asked {to[1:]}"))
    places = {"model": small_model, "folder": small_model.parent, "other": tmp_path / "other"}
    files = {
        "data_clean": [f"--dataset_file={arguments['dataset_file']}", f"--output_file={tmp_path}/o"],
        "show_mask": [f"--dataset_file={arguments['dataset_file']}"],
        "inspect_data": [arguments["dataset_file"]],
    }
    if script == "inspect_data" and len(given) == 1:
        return  # tokens are not counted then
    started = time.monotonic()
    done = run_script(script, *files[script], *(f"--{flag.format(**places)}" for flag in given))
    assert done.code == 2 and re.search(message.format(**places), done.err), done.said
    assert time.monotonic() - started < 20  # no minute of retries
