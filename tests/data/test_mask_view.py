"""The mask viewer shows what training sees, and nothing in a record can pass for something else."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from steerlm_nemo.attributes import NEMO12_LANG
from steerlm_nemo.data.mask_view import CUT, TARGET, views_of_lines, visible
from steerlm_nemo.data.preprocessing import Options, preprocess
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.records import Accounting, dump_record
from steerlm_nemo.report.mask import html_page, terminal_text
from steerlm_nemo.template import EXTRA_ID_TEMPLATE, ChatTemplate
from steerlm_nemo.tokenizer import SentencePieceTokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "show_mask.py"
LINE = "quality:4,lang:en"


def write(path, *records):
    path.write_text("".join(dump_record(record) + "\n" for record in records), encoding="utf-8")
    return path


def record(*turns, type="TEXT_TO_VALUE", system="SYS.\n\n"):
    raw = [dict(zip(("from", "value", "label"), turn, strict=False)) for turn in turns]
    return {"conversations": raw, "system": system, "mask": "User", "type": type}


SHORT = record(("User", "Hi?", LINE), ("Assistant", "It is 4.", LINE), ("User", "Thanks"))
WHOLE = r"""\x00System\n
SYS.\n
\n
\n
\x11User\n
Hi?\n
\x12quality:4,lang:en\n
\x11Assistant\n
It is 4.\n
\x12[[quality:4,lang:en\n]]
[[\x11]]User\n
Thanks\n
"""


def text_part(shown):
    return shown.split("text ([[target]] {{cut}})\n")[1].split("\ntokens (")[0]


def test_targets_stand_in_brackets_and_bytes_are_spelled_out(tmp_path, small_tokenizer):
    (view,) = views_of_lines(write(tmp_path / "a.jsonl", SHORT), [1], ChatTemplate(), small_tokenizer, 256)
    assert text_part(terminal_text(view, colour=False)) == WHOLE
    assert "data_clean: kept" in view.summary()
    assert "no loss on User" in view.summary()


def test_the_cut_is_where_training_cuts(tmp_path, small_tokenizer):
    source = write(tmp_path / "a.jsonl", SHORT)
    (whole,) = views_of_lines(source, [1], ChatTemplate(), small_tokenizer, 256)
    last_target = max(i for i, token in enumerate(whole.tokens) if token.kind == TARGET)
    (view,) = views_of_lines(source, [1], ChatTemplate(), small_tokenizer, last_target - 1)
    # The closing marker falls out; what follows it is cut as well.
    assert text_part(terminal_text(view, colour=False)) == WHOLE.replace(
        "[[\\x11]]User\\n\nThanks\\n\n", "{{\\x11User\\n}}\n{{Thanks\\n}}\n"
    )


@pytest.mark.parametrize("seq_len", [200, 4096])
def test_genuine_records_are_shown_as_the_training_dataset_holds_them(tmp_path, shared_data, llama2_model, seq_len):
    from steerlm_nemo.training.datasets.chat import ChatDataset

    source = tmp_path / "out_train.jsonl"
    trees = shared_data / "oasst-unlabelled-trees" / "trees.jsonl.gz"
    options = Options(record_type="VALUE_TO_TEXT")
    preprocess(
        trees, tmp_path / "out", split_ratio=1, seed=10, options=options, trees=Accounting.beside(tmp_path / "o")
    )
    tokenizer = SentencePieceTokenizer(llama2_model)
    trained = ChatDataset(source, tokenizer, ChatTemplate(), seq_len, 16, None, NEMO12_LANG)
    num_lines = len(source.read_text(encoding="utf-8").splitlines())
    views = views_of_lines(source, range(1, num_lines + 1), ChatTemplate(), tokenizer, seq_len)
    kept = [view for view in views if view.verdict == "kept"]
    assert len(kept) > 100
    for view, item in zip(kept, trained.items, strict=True):
        seen = [token for token in view.tokens if token.kind != CUT]
        assert [token.id for token in seen] == item["token_ids"].tolist()
        assert [int(token.kind == TARGET) for token in seen] == item["loss_mask"].tolist()
        for segment, tokens in view.segments:
            assert "".join(token.text for token in tokens) == segment.text


def test_nothing_in_a_text_can_pass_for_something_else(tmp_path, small_tokenizer):
    evil = record(("User", "\x1b[2J a\\x12b\x12c \u202e <script>x</script>"), ("Assistant", "ok", LINE))
    (view,) = views_of_lines(write(tmp_path / "a.jsonl", evil), [1], ChatTemplate(), small_tokenizer, 256)
    shown = terminal_text(view, colour=False)
    assert "\x1b" not in shown and "\u202e" not in shown
    assert r"\x1b[2J a\\x12bc \u202e <script>" in shown  # the marker is gone, its spelling is not
    assert "marker texts taken out of the content: 1" in shown
    assert "<script>" not in html_page([view])
    assert visible("\t\\\x00é😀") == r"\t\\\x00é😀"


def test_a_hugging_face_tokenizer_with_text_markers(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    from steerlm_nemo.tokenizer import HuggingFaceTokenizer

    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<eos>"])
    model.train_from_iterator(["quality Assistant User System"], trainer)
    model.save(str(tmp_path / "tokenizer.json"))
    tokenizer = HuggingFaceTokenizer(tmp_path / "tokenizer.json", EXTRA_ID_TEMPLATE.markers)
    asked = record(("User", "Hé?"), ("Assistant", "日本", LINE), type="VALUE_TO_TEXT")
    (view,) = views_of_lines(write(tmp_path / "a.jsonl", asked), [1], EXTRA_ID_TEMPLATE, tokenizer, 256)
    assert text_part(terminal_text(view, colour=False)).endswith(
        "<extra_id_1>User\\n\nHé?\\n\n<extra_id_1>Assistant\\n\n<extra_id_2>quality:4,lang:en\\n\n[[日本\\n]]\n"
        "[[<extra_id_1>]]\n"
    )


def test_lines_without_a_usable_record_are_named(tmp_path, small_tokenizer):
    source = write(tmp_path / "a.jsonl", SHORT)
    source.write_text(source.read_text() + "\n{\n" + json.dumps(record(("User", "\ud800"))) + "\n")
    for line, error, message in (
        (2, InputError, r"a\.jsonl:2: no record on this line; the last is on line 4"),
        (9, InputError, r"a\.jsonl:9: no record"),
        (3, RecordError, r"a\.jsonl:3: not JSON"),
        (4, RecordError, r"a\.jsonl:4: lone surrogate"),
    ):
        with pytest.raises(error, match=message):
            views_of_lines(source, [line], ChatTemplate(), small_tokenizer, 256)


# --- the script ---


@pytest.fixture
def command(tmp_path, small_model):
    source = write(tmp_path / "a.jsonl", SHORT, record(("User", "second"), ("Assistant", "Yes", LINE)))
    return [
        *(sys.executable, str(SCRIPT), f"--dataset_file={source}", "--library=sentencepiece"),
        *(f"--model_file={small_model}", "--seq_len=256"),
    ]


def test_the_script_shows_the_lines_asked_for_without_colour_in_a_pipe(command, tmp_path):
    html = tmp_path / "mask.html"
    done = subprocess.run([*command, "--line", "2", "1", "--html", html], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout
    assert done.stdout.index("second") < done.stdout.index("Thanks")
    assert html.read_text(encoding="utf-8").count("<h2>") == 2


def test_the_script_colours_on_a_terminal_only_and_not_against_the_users_will(command):
    def on_a_terminal(**env):
        master, slave = pty.openpty()
        subprocess.run(command, stdout=slave, check=True, timeout=60, env={**os.environ, "TERM": "xterm", **env})
        os.close(slave)
        shown = b""
        while True:
            try:
                shown += os.read(master, 65536)
            except OSError:  # the other side is closed and all is read
                os.close(master)
                return shown.decode()

    coloured = on_a_terminal()
    assert "\x1b[1;32mquality:4,lang:en\\n\x1b[0m" in coloured and "[[" not in coloured
    assert "[[quality:4,lang:en\\n]]" in on_a_terminal(NO_COLOR="1")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--line=0"], "--line is 0"),
        (["--line=5"], "a.jsonl:5: no record on this line"),
        (["--dataset_file=none.jsonl"], "none.jsonl: no such file"),
        (["--turn_start=a", "--compat=nemo1.23"], "one of: --template_from, --compat"),
    ],
)
def test_the_script_refuses_bad_arguments_with_one_line(command, change, message):
    done = subprocess.run([*command, *change], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1
