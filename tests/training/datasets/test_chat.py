"""The batches the trainer gets (reference flow 3.5, D-03, D-11)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from runs import write_records

from steerlm_nemo.attributes import HELPSTEER5, NEMO12_LANG
from steerlm_nemo.errors import ConfigError, InputError
from steerlm_nemo.template import ChatTemplate
from steerlm_nemo.tokenizer import SentencePieceTokenizer
from steerlm_nemo.training.datasets.chat import ChatDataset


def dataset(path: Path, tokenizer: SentencePieceTokenizer, max_seq_length: int = 256) -> ChatDataset:
    return ChatDataset(path, tokenizer, ChatTemplate(), max_seq_length, 16, None, NEMO12_LANG)


def test_labels_are_tokens_shifted_and_the_loss_covers_the_grades_only(
    tmp_path: Path, small_tokenizer: SentencePieceTokenizer
) -> None:
    data = dataset(write_records(tmp_path / "t2v.jsonl", 3, "TEXT_TO_VALUE"), small_tokenizer)
    batch = data.collate_fn([data[0], data[1], data[2]])
    for row in range(3):
        ids = torch.from_numpy(data[row]["token_ids"]).long()
        assert torch.equal(batch["tokens"][row, : len(ids) - 1], ids[:-1])
        assert torch.equal(batch["labels"][row, : len(ids) - 1], ids[1:])
    assert batch["tokens"].shape[1] % 16 == 0
    for row in range(3):
        supervised = batch["labels"][row][batch["loss_mask"][row].bool()].tolist()
        text = small_tokenizer.decode(supervised)
        assert text.startswith("quality:") and text.endswith("toxicity:0\n\x11")
    assert torch.equal(batch["position_ids"][0], torch.arange(batch["tokens"].shape[1]))


def test_padding_is_eos_without_loss(tmp_path: Path, small_tokenizer: SentencePieceTokenizer) -> None:
    data = dataset(write_records(tmp_path / "t2v.jsonl", 1, "TEXT_TO_VALUE"), small_tokenizer)
    num_ids = len(data[0]["token_ids"])
    batch = data.collate_fn([data[0]])
    assert batch["tokens"][0, num_ids - 1 :].eq(small_tokenizer.eos_id).all()
    assert batch["loss_mask"][0, num_ids - 1 :].sum() == 0


def test_a_record_whose_target_lies_beyond_the_cut_is_left_out_and_counted(
    tmp_path: Path, small_tokenizer: SentencePieceTokenizer
) -> None:
    """D-11: it would give a loss of 0/0."""
    path = write_records(tmp_path / "t2v.jsonl", 4, "TEXT_TO_VALUE")
    lines = path.read_text().splitlines()
    long = json.loads(lines[0])
    long["conversations"][0]["value"] = "again " * 400
    path.write_text("\n".join([json.dumps(long), *lines[1:]]) + "\n")
    data = dataset(path, small_tokenizer)
    assert len(data) == 3
    assert data.report.num_without_target == 1
    assert "1 left out" in data.report.line()


def test_a_cut_keeps_exactly_the_targets_inside_the_window(
    tmp_path: Path, small_tokenizer: SentencePieceTokenizer
) -> None:
    path = write_records(tmp_path / "t2v.jsonl", 1, "TEXT_TO_VALUE")
    whole = dataset(path, small_tokenizer)
    first_target = int(whole[0]["loss_mask"].nonzero()[0][0])
    kept = dataset(path, small_tokenizer, max_seq_length=first_target)
    assert kept.collate_fn([kept[0]])["loss_mask"].sum() == 1
    with pytest.raises(ConfigError, match="no conversation with a target"):
        dataset(path, small_tokenizer, max_seq_length=first_target - 1)


def test_every_unusable_record_is_named_at_once(tmp_path: Path, small_tokenizer: SentencePieceTokenizer) -> None:
    path = write_records(tmp_path / "t2v.jsonl", 6, "TEXT_TO_VALUE")
    lines = path.read_text().splitlines()
    lines[1], lines[3], lines[4] = "{", lines[3].replace("toxicity:0", "toxicity:9"), lines[4].replace("?", "\\ud800")
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError) as caught:
        dataset(path, small_tokenizer)
    first, *named = str(caught.value).split("\n  ")
    assert first.startswith(f"{path}: 3 of 6 records cannot be used; scripts/data_clean.py")
    assert [problem.split(" ")[0].rstrip(":") for problem in named] == [f"{path}:{line}" for line in (2, 4, 5)]
    assert "lone surrogate" in named[2]


def test_several_processes_prepare_the_same_items(tmp_path: Path, small_tokenizer: SentencePieceTokenizer) -> None:
    path = write_records(tmp_path / "t2v.jsonl", 100, "TEXT_TO_VALUE")
    one = dataset(path, small_tokenizer)
    two = ChatDataset(path, small_tokenizer, ChatTemplate(), 256, 16, None, NEMO12_LANG, num_workers=2)
    assert one.report == two.report
    for first, second in zip(one.items, two.items, strict=True):
        assert first["token_ids"].tolist() == second["token_ids"].tolist()
        assert first["loss_mask"].tolist() == second["loss_mask"].tolist()


def test_records_of_two_types_are_refused(tmp_path: Path, small_tokenizer: SentencePieceTokenizer) -> None:
    path = write_records(tmp_path / "both.jsonl", 2, "TEXT_TO_VALUE")
    other = write_records(tmp_path / "other.jsonl", 1, "VALUE_TO_TEXT")
    path.write_text(path.read_text() + other.read_text())
    with pytest.raises(ConfigError, match=r"several types \(TEXT_TO_VALUE at .*:1, VALUE_TO_TEXT at .*:3\)"):
        dataset(path, small_tokenizer)


def test_a_steering_run_refuses_grading_records(tmp_path: Path, small_tokenizer: SentencePieceTokenizer) -> None:
    """D-03: annotated T2V files keep their type, and training on them trains a second value model."""
    path = write_records(tmp_path / "t2v.jsonl", 2, "TEXT_TO_VALUE")
    with pytest.raises(ConfigError, match="type is TEXT_TO_VALUE, but model.data.record_type asks for VALUE_TO_TEXT"):
        ChatDataset(path, small_tokenizer, ChatTemplate(), 256, 16, "VALUE_TO_TEXT", NEMO12_LANG)


def test_labels_that_the_schema_does_not_know_are_refused(
    tmp_path: Path, small_tokenizer: SentencePieceTokenizer
) -> None:
    """The schema goes into the .nemo, and the server would grade attributes the model never saw."""
    path = write_records(tmp_path / "t2v.jsonl", 2, "TEXT_TO_VALUE")
    with pytest.raises(InputError) as caught:
        ChatDataset(path, small_tokenizer, ChatTemplate(), 256, 16, None, HELPSTEER5)
    _, told, advice = str(caught.value).split("\n")  # once, however many records there are
    assert told.startswith("  2 records: unknown attribute 'quality'")
    assert told.endswith(f"(schema helpsteer5) (first: {path}:1 turn 1)")
    assert advice.startswith("The records have quality, toxicity; the schema here is helpsteer5.")
    assert "oasst4" in advice and "helpsteer5 would" not in advice
    path.write_text(path.read_text().replace("toxicity:0", "toxicity:9"))
    with pytest.raises(InputError, match="toxicity is 9, but it must be 0 to 4"):
        dataset(path, small_tokenizer)


@pytest.mark.parametrize("max_seq_length", [256, 60, 52])
def test_a_batch_equals_nemos_own_collation(tmp_path: Path, small_model: Path, max_seq_length: int) -> None:
    """NeMo's GPTSFTChatDataset on the same file, through its own collate_fn."""
    pytest.importorskip("nemo", reason="needs nemo_toolkit")
    from steerlm_nemo.compat import prepare

    prepare()
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer as NeMoTokenizer
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import GPTSFTChatDataset

    path = write_records(tmp_path / "v2t.jsonl", 4, "VALUE_TO_TEXT")
    markers = {
        "system_turn_start": "\x00",
        "turn_start": "\x11",
        "label_start": "\x12",
        "end_of_turn": "\n",
        "end_of_name": "\n",
    }
    theirs = GPTSFTChatDataset(
        file_path=str(path),
        tokenizer=NeMoTokenizer(str(small_model), legacy=False),
        max_seq_length=max_seq_length,
        tokens_to_generate=0,
        min_seq_length=1,
        pad_to_max_length=False,
        pad_seq_length_to_mult=16,
        index_mapping_dir=str(tmp_path),
        special_tokens=markers,
        memmap_workers=1,
    )
    ours = dataset(path, SentencePieceTokenizer(small_model), max_seq_length)
    expected = theirs.collate_fn([theirs[i] for i in range(4)])
    batch = ours.collate_fn([ours[i] for i in range(4)])
    assert batch["loss_mask"].any()
    for key in ("tokens", "labels", "loss_mask", "position_ids"):
        assert torch.equal(batch[key], torch.as_tensor(expected[key]).to(batch[key].dtype)), key
    # Nothing but causal, which is what the model's own is; padding is not blocked.
    length = batch["tokens"].shape[1]
    assert torch.equal(expected["attention_mask"], torch.ones(length, length).triu(1).bool().expand(4, 1, -1, -1))
