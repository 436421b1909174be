"""What inspect_data counts, against numpy, data_clean and known files; and the page it writes."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from steerlm_nemo.attributes import HELPSTEER5, Attributes
from steerlm_nemo.data import inspection
from steerlm_nemo.data.cleaning import TARGET_BEYOND, Cleaner, clean_file
from steerlm_nemo.data.inspection import AttributeCounts, inspect_file, leakage, percentile
from steerlm_nemo.data.preprocessing import Options, preprocess
from steerlm_nemo.errors import InputError
from steerlm_nemo.records import Accounting, dump_record
from steerlm_nemo.report.inspection import facts, html_report, text_report
from steerlm_nemo.template import ChatTemplate

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "inspect_data.py"


def record(question, answer="Yes.", label="quality:4,lang:en", **fields):
    turns = [{"value": question, "from": "User", "label": None}, {"value": answer, "from": "Assistant", "label": label}]
    return {"conversations": turns, "system": "SYS.\n\n", "mask": "User", "type": "VALUE_TO_TEXT", **fields}


def write(path, *records):
    path.write_text("".join(dump_record(one) + "\n" for one in records), encoding="utf-8")
    return str(path)


def inspect(path, scratch, tokenizer=None, **options):
    return inspect_file(str(path), Options(**options), ChatTemplate(), tokenizer, "auto", scratch)


# --- counting ---


@pytest.mark.parametrize("most_lines", [3, 10_000])
def test_grades_are_counted_and_correlated_as_numpy_does(monkeypatch, most_lines):
    monkeypatch.setattr(inspection, "_MOST_LINES", most_lines)
    chance = np.random.default_rng(0)
    table = chance.integers(0, 5, size=(300, 3))
    table[:, 1] = np.clip(table[:, 0] + chance.integers(-1, 2, size=300), 0, 4)
    grades = AttributeCounts()
    for quality, humor, toxicity in table.tolist():
        grades.add(Attributes((("quality", quality), ("humor", humor), ("toxicity", toxicity), ("violence", 0))))
    assert grades.counts()["humor"] == Counter(table[:, 1].tolist())
    expected = np.corrcoef(table.T)
    for i, one in enumerate(("quality", "humor", "toxicity")):
        for j, other in enumerate(("quality", "humor", "toxicity")):
            assert grades.correlation(one, other) == pytest.approx(expected[i, j])
    assert grades.correlation("quality", "violence") is None  # which never varies
    assert grades.correlation("violence", "violence") is None


def test_only_turns_graded_on_both_enter_a_correlation():
    grades = AttributeCounts()
    for line in ("quality:1,humor:1", "quality:2,humor:2", "quality:4", "humor:4", "quality:3,humor:3"):
        grades.add(Attributes.parse(line))
    assert grades.correlation("humor", "quality") == pytest.approx(1.0)


def test_percentiles_are_sizes_that_occur():
    sizes = Counter({10: 50, 20: 40, 1000: 10})
    assert [percentile(sizes, share) for share in (0.5, 0.51, 0.9, 0.91, 1.0)] == [10, 20, 20, 1000, 1000]


def test_truncation_is_what_data_clean_leaves_out(tmp_path, shared_data, small_tokenizer):
    trees = shared_data / "oasst2-animals-trees" / "trees.jsonl.gz"
    options = Options()
    preprocess(
        trees, tmp_path / "out", split_ratio=1, seed=10, options=options, trees=Accounting.beside(tmp_path / "o")
    )
    found = inspect(tmp_path / "out_train.jsonl", tmp_path, small_tokenizer)
    for seq_len in (400, 1500):
        counts = Accounting.beside(tmp_path / "clean.jsonl")
        cleaner = Cleaner(ChatTemplate(), small_tokenizer, seq_len)
        findings = clean_file(tmp_path / "out_train.jsonl", tmp_path / "clean.jsonl", cleaner, counts)
        cut = found.longer_than(seq_len)
        assert cut.num_without_target == counts.counts["filtered"] > 0
        kept_cut = findings.counts["records longer than seq_len"]
        assert cut.num_cut == kept_cut + counts.reasons[TARGET_BEYOND]


def test_trees_are_inspected_as_the_records_that_preprocessing_makes_of_them(tmp_path, shared_data, small_tokenizer):
    trees = shared_data / "oasst1-en-validation" / "trees.jsonl.gz"
    accounting = Accounting.beside(tmp_path / "out")
    preprocess(trees, tmp_path / "out", split_ratio=1, seed=10, options=Options(), trees=accounting)
    of_trees = inspect(trees, tmp_path, small_tokenizer)
    of_records = inspect(tmp_path / "out_train.jsonl", tmp_path, small_tokenizer)
    assert of_trees.records.counts == accounting.counts
    for name in ("turns", "tokens", "first_targets", "characters", "graded_turns_of", "languages", "prompts"):
        assert getattr(of_trees, name) == getattr(of_records, name), name
    assert of_trees.attributes.counts() == of_records.attributes.counts()
    assert of_trees.num_conversations == 683


@pytest.mark.parametrize(
    ("file", "conversations", "rejected"),
    [
        ("oasst1-en-validation/messages.jsonl.gz", 683, 2),
        ("oasst2-animals-trees/trees.jsonl.gz", 402, 0),
        ("helpsteer-sample/helpsteer.jsonl.gz", 317, 0),
        ("hh-rlhf/helpful-base-train-sample.jsonl.gz", 716, 1),
        ("cvalues/cvalues_comparison_two_rows.jsonl", 4, 0),
        ("rewardbench-sample/reward_bench.jsonl.gz", 696, 0),
        ("nemo-aligner-test-data/sft-chat.jsonl", 21, 0),
    ],
)
def test_whatever_preprocessing_reads_can_be_inspected(tmp_path, shared_data, file, conversations, rejected):
    found = inspect(shared_data / file, tmp_path)
    assert found.num_conversations == conversations
    assert found.records.counts["rejected"] == len(found.rejects) == rejected
    assert text_report([found], [4096]) and html_report([found], [4096])
    json.dumps(facts([found], [4096]), allow_nan=False)


def test_a_genuine_sample_shows_the_published_correlation_of_helpsteer(tmp_path, shared_data):
    """arXiv 2311.09528: correctness .85 and verbosity .26 with helpfulness, on all 37,120 rows; here are 317."""
    found = inspect(shared_data / "helpsteer-sample" / "helpsteer.jsonl.gz", tmp_path)
    assert {*found.attributes.counts()} == {*HELPSTEER5.names}
    assert found.attributes.correlation("correctness", "helpfulness") == pytest.approx(0.85, abs=0.1)
    assert found.attributes.correlation("verbosity", "helpfulness") == pytest.approx(0.26, abs=0.2)


def test_duplicates_are_found_but_for_case_and_blanks(tmp_path):
    records = [record("Why?"), record("why? "), record("Why not?"), record("Why?", answer="No."), record("  WHY?")]
    found = inspect(write(tmp_path / "a.jsonl", *records), tmp_path)
    assert found.num_duplicates == 2
    assert found.duplicates == [(2, 1), (5, 1)]
    assert len(found.prompts) == 2


def test_what_two_files_share_is_found(tmp_path):
    train = inspect(write(tmp_path / "train.jsonl", record("a"), record("b"), record("c")), tmp_path)
    val = inspect(write(tmp_path / "val.jsonl", record("x"), record("b"), record("c", answer="No.")), tmp_path)
    leak = leakage(train, val)
    assert (leak.num_same, leak.num_same_prompt, leak.num_conversations, leak.examples) == (1, 2, 3, ((2, 2),))
    shown = text_report([train, val], [4096])
    assert re.search(r"val\.jsonl +train\.jsonl +1 \(33\.3%\) +2 \(66\.7%\) +line 2 is line 2", shown)


def test_no_prompt_leaks_through_the_split_of_preprocessing(tmp_path, shared_data):
    preprocess(
        *(shared_data / "oasst2-animals-trees" / "trees.jsonl.gz", tmp_path / "out"),
        **dict(split_ratio=0.7, seed=10, options=Options(), trees=Accounting.beside(tmp_path / "out")),
    )
    train, val = (inspect(tmp_path / f"out_{part}.jsonl", tmp_path) for part in ("train", "val"))
    leak = leakage(train, val)
    assert leak.num_conversations > 50
    assert leak.num_same == leak.num_same_prompt == 0


def test_records_of_our_own_keep_their_speakers(tmp_path):
    turns = [
        {"value": "Hi", "from": "Guest", "label": "humor:1"},
        {"value": "Yes.", "from": "Host", "label": "humor:3"},
    ]
    own = {"conversations": turns, "system": "", "mask": "Guest", "type": None}
    found = inspect(write(tmp_path / "a.jsonl", own), tmp_path)
    assert dict(found.turns_of) == {"Guest": 1, "Host": 1}
    assert found.attributes.counts() == {"humor": Counter({3: 1})}


def test_chat_records_of_others_that_have_a_type_are_read_as_preprocessing_reads_them(tmp_path):
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yes."}]
    source = write(
        tmp_path / "a.jsonl", *({"conversations": turns, "type": kind} for kind in ("sharegpt", ["x"], None))
    )
    found = inspect(source, tmp_path, record_type="VALUE_TO_TEXT")
    assert dict(found.turns_of) == {"User": 3, "Assistant": 3}
    assert dict(found.types) == {"VALUE_TO_TEXT": 3}


def test_memory_does_not_grow_with_the_texts(tmp_path):
    def peak(num_characters):
        source = write(tmp_path / "a.jsonl", *(record(f"{n} " + "x" * num_characters) for n in range(200)))
        tracemalloc.start()
        inspect(source, tmp_path)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(10)  # what the first run imports
    few, many = peak(1_000), peak(50_000)
    assert many - few < 1_000_000  # 200 records have 10 MB more text; one of them is in memory several times


# --- what is shown ---


def test_the_page_needs_no_network_and_shows_texts_as_texts(tmp_path, small_tokenizer):
    chance = random.Random(0)
    evil = [
        record(f"<script>{n}</script>", label=f"quality:{chance.randrange(5)},humor:{chance.randrange(5)}")
        for n in range(50)
    ]
    evil[0]["conversations"][0]["lang"] = "<b>"
    bad = write(tmp_path / "<i>a.jsonl", *evil)
    with open(bad, "a") as file:
        file.write('{"<script>": 1}\n')
    found = inspect(bad, tmp_path, small_tokenizer)
    page = html_report([found, found], [100, 4096])
    assert "<script>" not in page and "<i>" not in page and "<b>:" not in page
    assert not re.findall(r"(?:src|href|url)\s*[=(]|https?://(?!www\.w3\.org/2000/svg)", page)
    assert page.count("<svg") >= 4 and "table class=heat" in page


def test_the_script_writes_tables_page_and_figures(tmp_path, small_model):
    train = write(tmp_path / "train.jsonl", *(record(f"question {n}") for n in range(20)))
    val = write(tmp_path / "val.jsonl", record("question 3"), record("other"))
    done = subprocess.run(
        [
            *(sys.executable, SCRIPT, train, val, f"--model_file={small_model}", "--seq_len", "64", "100"),
            *(f"--html={tmp_path / 'data.html'}", f"--json={tmp_path / 'data.json'}"),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"records read +20 +2\n", done.stdout)
    assert re.search(r"val\.jsonl +train\.jsonl +1 \(50\.0%\)", done.stdout)
    figures = json.loads((tmp_path / "data.json").read_text())
    assert figures["leakage"][0]["examples"] == [[f"{val}:1", f"{train}:4"]]
    first = figures["files"][0]
    assert [cut["seq_len"] for cut in first["truncation"]] == [64, 100]
    assert first["attributes"]["quality"] == {"count": 20, "coverage": 1.0, "mean": 4.0, "grades": {"4": 20}}
    assert (tmp_path / "data.html").read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl"], "none.jsonl: no such file"),
        (["{file}", "--seq_len", "0"], "--seq_len is 0"),
        (["{file}", "--type", "FOO"], "--type is 'FOO'"),
        (["{file}", "--mask_role", "Usr"], "did you mean User?"),
        (["{file}", "--format", "oast"], "--format is 'oast'"),
        (["{file}", "--model_file", "none.model"], "none.model: no such file"),
        (["{empty}"], "no conversation in it: 1 records read\n  {empty}:1: not JSON"),
    ],
)
def test_the_script_refuses_what_it_cannot_use(tmp_path, arguments, message):
    (tmp_path / "empty.jsonl").write_text("{\n")
    names = {"file": write(tmp_path / "a.jsonl", record("a")), "empty": str(tmp_path / "empty.jsonl")}
    command = [sys.executable, str(SCRIPT), *(argument.format(**names) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "error: " in done.stderr and message.format(**names) in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_without_a_conversation_is_an_error_that_names_places(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"conversations": 1}\n')
    with pytest.raises(InputError, match=r"no conversation in it: 1 records read\n  .*a\.jsonl:1: wrong type"):
        inspect(tmp_path / "a.jsonl", tmp_path)


def test_speakers_of_other_chat_files_are_counted_as_preprocessing_writes_them(tmp_path):
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "r"}]
    ours = [{"from": "User", "value": "q"}, {"from": "Assistant", "value": "r"}]
    masked = [{"from": "human", "value": "q"}, {"from": "Expert", "value": "r"}]
    for record, speakers in (
        ({"conversations": turns, "system": "S", "type": None}, {"User", "Assistant"}),
        ({"conversations": ours, "system": "S", "type": None}, {"User", "Assistant"}),
        ({"conversations": masked, "system": "S", "type": None, "mask": "human"}, {"human", "Expert"}),
    ):
        path = tmp_path / "in.jsonl"
        path.write_text(json.dumps(record) + "\n")
        found = inspect_file(str(path), Options(), ChatTemplate(), None, "auto", tmp_path)
        assert found.turns_of.keys() == speakers
        assert found.num_responses == 1
