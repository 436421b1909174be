"""A world small enough to learn in seconds: a response is three words, and each word is one attribute's value.

"fair joke hallo" is quality 2, humor 1, lang de. A tiny Llama learns to grade it (TEXT_TO_VALUE) and to write it
(VALUE_TO_TEXT), so that annotation and steering can be tested on models that really do their job.
"""

from __future__ import annotations

import io
import random
from pathlib import Path

import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steerlm_nemo.attributes import Attribute, Attributes, AttributeSchema
from steerlm_nemo.conversation import Conversation, RecordRef, Turn
from steerlm_nemo.model_kind import SteerLMFormat, kind_trained_on
from steerlm_nemo.template import ChatTemplate
from steerlm_nemo.tokenizer import SentencePieceTokenizer

SCHEMA = AttributeSchema("tiny", (Attribute("quality", 0, 4, 4), Attribute("humor", 0, 2, 0)), ("en", "de"))
TEMPLATE = ChatTemplate()
SYSTEM = "Three words.\n\n"
WORDS = {
    "quality": ("bad", "poor", "fair", "good", "great"),
    "humor": ("dry", "joke", "laugh"),
    "lang": ("hello", "hallo"),
}
QUESTIONS = ("Tell me.", "Speak!", "And now?", "Say it again.")


def response(values: dict[str, int | str]) -> str:
    lang = SCHEMA.languages.index(str(values["lang"]))
    return " ".join(
        (WORDS["quality"][int(values["quality"])], WORDS["humor"][int(values["humor"])], WORDS["lang"][lang])
    )


def reading(text: str) -> dict[str, int | str]:
    """The exact values of a response. Raises ValueError if it is not one."""
    quality, humor, lang = text.split(" ")
    return {
        "quality": WORDS["quality"].index(quality),
        "humor": WORDS["humor"].index(humor),
        "lang": SCHEMA.languages[WORDS["lang"].index(lang)],
    }


def conversations(count: int, record_type: str, seed: int) -> list[Conversation]:
    chance = random.Random(seed)
    made = []
    for number in range(count):
        turns = []
        for _ in range(chance.randint(1, 2)):
            values: dict[str, int | str] = {
                "quality": chance.randrange(5),
                "humor": chance.randrange(3),
                "lang": chance.choice(SCHEMA.languages),
            }
            turns += [
                Turn("User", chance.choice(QUESTIONS)),
                Turn("Assistant", response(values), SCHEMA.order(values)),
            ]
        made.append(Conversation(SYSTEM, tuple(turns), RecordRef("tiny", number + 1), record_type))  # type: ignore[arg-type]
    return made


def record(conversation: Conversation) -> dict[str, object]:
    """The line of a chat file, human labels and all."""
    turns = [
        {"value": turn.text, "from": turn.role, "label": turn.attributes.line if turn.attributes else None}
        for turn in conversation.turns
    ]
    return {
        "conversations": turns,
        "tree_id": f"t{conversation.ref.line}",
        "system": conversation.system,
        "mask": "User",
        "type": conversation.type,
    }


def make_tokenizer(folder: Path) -> SentencePieceTokenizer:
    texts = [
        "".join(segment.text for segment in TEMPLATE.segments(conversation)).translate({0: "", 17: "", 18: ""})
        for conversation in conversations(200, "TEXT_TO_VALUE", seed=1)
    ]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in texts for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=360,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return SentencePieceTokenizer(folder / "tokenizer.model")


def make_model(
    folder: Path, record_type: str | None, steps: int, records: list[Conversation] | None = None
) -> SteerLMFormat:
    """Train a tiny Llama on `record_type` (None: leave it random) and save it, tokenizer included, to the folder.

    `records`, 32 at least, take the place of the tiny world's own conversations.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
        )
    )
    if record_type is not None:
        records = records or conversations(2000, record_type, seed=2)
        _train(model, [TEMPLATE.render(record, tokenizer) for record in records], steps)
    model.save_pretrained(folder)
    return SteerLMFormat(TEMPLATE, SCHEMA, kind_trained_on(record_type or "TEXT_TO_VALUE"))


def _train(model: LlamaForCausalLM, rendered: list, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
    chance = random.Random(3)
    model.train()
    for _ in range(steps):
        batch = chance.sample(rendered, 32)
        longest = max(len(row.token_ids) for row in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        targets = torch.full((len(batch), longest), -100)
        for index, row in enumerate(batch):
            length = len(row.token_ids)
            ids[index, :length] = torch.tensor(row.token_ids)
            mask = torch.tensor(row.loss_mask, dtype=torch.bool)
            targets[index, :length][mask] = ids[index, :length][mask]
        model(ids, labels=targets).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def values_of(line: str) -> dict[str, int | str]:
    return Attributes.parse(line).as_dict()
