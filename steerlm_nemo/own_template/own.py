"""What the files of a model say about its own chat template. Nothing of it has run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class OwnTemplate:
    source: str  # Jinja
    names: Mapping[str, Any]  # what it may call special tokens: bos_token, eos_token, ...
    end_ids: tuple[int, ...] = ()  # tokens that end a response, beside the tokenizer's eos: of generation_config.json
    spaced: bool = True  # with SentencePiece, a text after a special token begins with a blank of its own
