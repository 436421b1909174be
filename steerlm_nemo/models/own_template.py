"""The chat template that a `.nemo` brings along from the model it was converted from, with what it refers to."""

from __future__ import annotations

import json
from typing import Any

from steerlm_nemo.checkpoint.archive import NemoFile
from steerlm_nemo.checkpoint.chat_template import CHAT_TEMPLATE, TOKENIZER_CONFIG, chat_template_of
from steerlm_nemo.checkpoint.llama_config import SOURCE_KEY
from steerlm_nemo.errors import CheckpointError
from steerlm_nemo.own_template.own import OwnTemplate
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer


def own_template_of(nemo: NemoFile, tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer) -> OwnTemplate | None:
    """None where the archive has no chat template.

    Raises:
        CheckpointError: it is no text, or the ids that end a response are no tokens.
    """
    files = {name: nemo.read(name) for name in (CHAT_TEMPLATE, TOKENIZER_CONFIG) if name in nemo.members}
    source = chat_template_of(files, f"{nemo.path}:")
    if source is None:
        return None
    names: dict[str, Any] = {**tokenizer.special_names}
    settings: dict[str, Any] = {}
    if isinstance(tokenizer, SentencePieceTokenizer):  # the other has read the file
        settings = json.loads(files.get(TOKENIZER_CONFIG, b"{}"))
        for name, token in settings.items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                names[name] = text
    generation = (nemo.config.get(SOURCE_KEY) or {}).get("generation_config") or {}
    ends = generation.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if wrong := [end for end in ends if type(end) is not int]:
        raise CheckpointError(
            f"{nemo.path}: model_config.yaml: {SOURCE_KEY}.generation_config.eos_token_id has {wrong[0]!r}; it must be "
            "the id of a token, or a list of ids"
        )
    return OwnTemplate(source, names, tuple(ends), settings.get("legacy", True) is not False)
