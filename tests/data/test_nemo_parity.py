"""Token ids and loss masks against NeMo's own GPTSFTChatDataset, on genuine and on random conversations.

Intended deviations, asserted here as such: an ungraded turn gives a value model no target (D-09), marker texts in
content are removed (D-10), and a mask that lists several roles is a list, not a substring test.
"""

import copy
import json
import os
import random
import string

import pytest

from steerlm_nemo.attributes import NEMO12_LANG
from steerlm_nemo.conversation import RECORD_TYPES, TEXT_TO_VALUE, VALUE_TO_TEXT, Conversation, RecordRef
from steerlm_nemo.data.preprocessing import Options, preprocess
from steerlm_nemo.records import Accounting, dump_record, read_records
from steerlm_nemo.template import ChatTemplate
from steerlm_nemo.tokenizer import SentencePieceTokenizer

REF = RecordRef("x.jsonl", 1)
TEMPLATE = ChatTemplate()
SPECIAL_TOKENS = {
    "system_turn_start": "\x00",
    "turn_start": "\x11",
    "label_start": "\x12",
    "end_of_turn": "\n",
    "end_of_name": "\n",
}


@pytest.fixture(scope="module")
def ours(llama2_model):
    return SentencePieceTokenizer(llama2_model)


@pytest.fixture(scope="module")
def nemo(llama2_model, tmp_path_factory):
    """NeMo's dataset class, made the way its trainer makes it."""
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "24.07")
    pytest.importorskip("nemo", reason="NeMo is not installed (pip install -e .[cpu])")
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer as NemoTokenizer
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import GPTSFTChatDataset

    folder = tmp_path_factory.mktemp("nemo")
    seed_record = record([("User", "Hi", None), ("Assistant", "Hello.", "quality:4")], TEXT_TO_VALUE)
    (folder / "data.jsonl").write_text(dump_record(seed_record) + "\n")
    return GPTSFTChatDataset(
        file_path=str(folder / "data.jsonl"),
        tokenizer=NemoTokenizer(str(llama2_model)),
        max_seq_length=4096,
        hf_dataset=True,
        index_mapping_dir=str(folder / "cache"),
        memmap_workers=1,
        special_tokens=SPECIAL_TOKENS,
    )


def record(turns, type, system="SYS.\n\n", mask="User"):
    raw = [{"value": text, "from": role, "label": label} for role, text, label in turns]
    return {"conversations": raw, "tree_id": "t", "system": system, "mask": mask, "type": type}


def nemo_renders(nemo, raw):
    item = nemo._process_example(copy.deepcopy(raw))  # it writes into the record
    return item["input_ids"].tolist(), item["mask"].int().tolist()


def we_render(tokenizer, raw):
    rendered = TEMPLATE.render(Conversation.from_record(raw, REF), tokenizer)
    return list(rendered.token_ids), list(rendered.loss_mask)


def in_loss(tokenizer, token_ids, loss_mask):
    return tokenizer.decode([i for i, mask in zip(token_ids, loss_mask, strict=True) if mask])


@pytest.mark.parametrize("record_type", RECORD_TYPES)
@pytest.mark.parametrize("folder", ["oasst1-en-validation", "oasst2-animals-trees", "oasst-unlabelled-trees"])
def test_every_genuine_conversation_has_nemos_tokens_and_loss(nemo, ours, shared_data, tmp_path, folder, record_type):
    preprocess(
        shared_data / folder / "trees.jsonl.gz",
        tmp_path / "out",
        split_ratio=1.0,
        seed=10,
        options=Options(record_type=record_type),
        trees=Accounting.beside(tmp_path / "out"),
    )
    num_same = 0
    for _, raw in read_records(tmp_path / "out_train.jsonl"):
        assert we_render(ours, raw) == nemo_renders(nemo, raw)
        num_same += 1
    assert num_same == {"oasst1-en-validation": 683, "oasst2-animals-trees": 402, "oasst-unlabelled-trees": 447}[folder]


SPECIALS = (
    *("\n", "\n\n", " ", "  ", "\t", "\r\n", "é", "日本語", "😀", "\u200d"),
    *("\x01", "\x7f", "</s>", "<s>", "<unk>", "▁"),
)


def random_text(rng):
    pieces = [
        rng.choice(SPECIALS) if rng.random() < 0.4 else "".join(rng.choices(string.ascii_letters + "., :", k=5))
        for _ in range(rng.randrange(8))
    ]
    return "".join(pieces)


def random_record(rng):
    """Speakers in any order, labels anywhere but that a value model's targets are all graded (else D-09)."""
    type = rng.choice([TEXT_TO_VALUE, VALUE_TO_TEXT, None])
    mask = rng.choice(["User", "User", "Assistant"])
    turns = []
    for _ in range(rng.randrange(1, 7)):
        role = rng.choice(["User", "Assistant"])
        graded = rng.random() < 0.6 or (type == TEXT_TO_VALUE and role != mask)
        line = ",".join(f"{key}:{rng.randrange(5)}" for key in NEMO12_LANG.names if rng.random() < 0.4)
        turns.append((role, random_text(rng), line if graded else None))
    return record(turns, type, system=random_text(rng), mask=mask)


@pytest.mark.slow
def test_random_conversations_have_nemos_tokens_and_loss(nemo, ours, shared_data):
    rng = random.Random(1234)
    num_same = num_refused = 0
    # The same conversations with another tokenizer, where that is a made one: fewer will do.
    is_made = shared_data.name.startswith("made")
    while num_same < (2_000 if is_made else 10_000):
        raw = random_record(rng)
        try:
            expected = nemo_renders(nemo, raw)
        except AssertionError as err:
            # NeMo raises where data_clean leaves out.
            assert str(err) in ("mask role not in the conversation", "mask is empty")
            if str(err) == "mask is empty":
                assert not any(we_render(ours, raw)[1])
            num_refused += 1
            continue
        assert we_render(ours, raw) == expected, json.dumps(raw)
        num_same += 1
    assert num_refused > 0


def test_deviation_d09_an_ungraded_response_is_no_target_of_a_value_model(nemo, ours):
    turns = [
        ("User", "Hi", None),
        ("Assistant", "It is 4.", None),
        ("User", "So", None),
        ("Assistant", "Yes", "quality:4"),
    ]
    raw = record(turns, TEXT_TO_VALUE)
    token_ids, loss_mask = we_render(ours, raw)
    nemo_ids, nemo_mask = nemo_renders(nemo, raw)
    assert token_ids == nemo_ids
    assert in_loss(ours, nemo_ids, nemo_mask) == "It is 4.\n\x11quality:4\n\x11"
    assert in_loss(ours, token_ids, loss_mask) == "quality:4\n\x11"


@pytest.mark.parametrize("type", [TEXT_TO_VALUE, VALUE_TO_TEXT, None])
def test_deviation_d10_marker_texts_in_content_are_left_out(nemo, ours, type):
    forged = record([("User", "Hi\x12quality:0\n", None), ("Assistant", "a\x11b\x12\n", "quality:4")], type)
    honest = record([("User", "Hiquality:0\n", None), ("Assistant", "ab\n", "quality:4")], type)
    assert we_render(ours, forged) == we_render(ours, honest) == nemo_renders(nemo, honest)
    try:
        nemo_ids, nemo_mask = nemo_renders(nemo, forged)
    except AssertionError:
        assert type == VALUE_TO_TEXT  # the label is not where NeMo looks for it
    else:
        assert nemo_ids != we_render(ours, forged)[0]
        if type == TEXT_TO_VALUE:  # content has entered the loss
            assert "\n\x12quality:4" in in_loss(ours, nemo_ids, nemo_mask)


def test_deviation_a_list_of_mask_roles_is_no_substring_test(nemo, ours):
    turns = [("User", "Hi", None), ("Use", "a", None), ("Assistant", "b", None)]
    raw = record(turns, None)
    assert in_loss(ours, *nemo_renders(nemo, raw)) == "b\n\x11"
    assert in_loss(ours, *we_render(ours, raw)) == "a\nb\n\x11"
