"""Prompts as the engine takes them: token ids, the room that the context leaves, and what ends a row."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import astuple

from steerlm_nemo.engine.protocol import ModelInfo, ServedTokenizer
from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.requests.generate import EOS_ALIAS


def prompt_ids(prompt: str, info: ModelInfo, add_BOS: bool, name: str) -> list[int]:
    """Tokens of a prompt, as training has them where the model was trained on our template.

    Raises:
        BadRequest: there is no BOS to add, or so long a text cannot fit the context.
    """
    tokenizer = info.tokenizer
    # Tokenising megabytes would hold everybody up for a minute: SentencePiece does not let other threads run.
    if len(prompt) > most_characters(info):
        raise no_room(name, f"{len(prompt)} characters", info)
    if info.format is not None:
        template = info.format.template
        ids = template.encode_prompt(prompt, tokenizer.for_template(astuple(template)))
    else:
        ids = tokenizer.encode(prompt)
    if not add_BOS:
        return ids
    if tokenizer.bos_id is None or tokenizer.bos_id < 0:
        raise BadRequest("add_BOS is true, but this model's tokenizer has no BOS token", param="add_BOS")
    return [tokenizer.bos_id, *ids]


def most_characters(info: ModelInfo) -> int:
    """No longer text can fit the context."""
    return info.context_length * longest_piece(info.tokenizer)


def no_room(name: str, length: str, info: ModelInfo) -> BadRequest:
    """The refusal of a prompt that fills the context, in words of OpenAI's and vLLM's by which clients know it."""
    return BadRequest(
        f"This model's maximum context length is {info.context_length} tokens. However, the prompt is too long: "
        f"{name} has {length}, which leaves no room to generate. Shorten it.",
        param=name,
        code="context_length_exceeded",
    )


@functools.lru_cache(maxsize=8)
def longest_piece(tokenizer: ServedTokenizer) -> int:
    """Characters that one token can stand for."""
    return max(len(tokenizer.id_to_piece(token_id)) for token_id in range(tokenizer.vocab_size))


def room_for(ids: Sequence[int], info: ModelInfo, name: str) -> int:
    """How many tokens fit the context after a prompt. Raises BadRequest: it is empty, or none do."""
    if not ids:
        raise BadRequest(f"{name} is empty; give it text, or set add_BOS to true", param=name)
    if (room := info.context_length - len(ids)) < 1:
        raise no_room(name, f"{len(ids)} tokens", info)
    return room


def stops(end_strings: Sequence[str], info: ModelInfo) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """End strings as token ids where one token is enough, as texts otherwise.

    eos always ends a row, and so does what generation_config.json says of a model that brings its own chat template.
    """
    tokenizer = info.tokenizer
    ids, texts = [tokenizer.eos_id, *(info.own_template.end_ids if info.own_template else ())], []
    # The reference's test for "one token": what the string adds to a text that cannot merge with it.
    base = tokenizer.encode("<extra_id_1>")
    for end in end_strings:
        if end == EOS_ALIAS:
            continue
        if len(end) > longest_piece(tokenizer):
            texts.append(end)
            continue
        extended = tokenizer.encode("<extra_id_1>" + end)
        if len(extended) == len(base) + 1 and extended[:-1] == base:
            ids.append(extended[-1])
        else:
            texts.append(end)
    return tuple(dict.fromkeys(ids)), tuple(dict.fromkeys(texts))
