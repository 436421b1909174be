"""The text of generated tokens: as it grows, without what only ended it, and token by token."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from steerlm_nemo.engine.protocol import ServedTokenizer

_CONTEXT = 6  # tokens before a new one that are decoded with it; a character is at most four
_UNFINISHED = "\ufffd"  # what decoders make of a character whose last bytes are still to come
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class GrowingText:
    """What tokens add to the text before them. Decoding a few at a time keeps the cost of a token constant."""

    def __init__(self, tokenizer: ServedTokenizer, prompt_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(prompt_ids[-_CONTEXT:])
        self._num_told = len(self._window)  # tokens of the window whose text is in `text`
        self.text = ""

    def add(self, token_id: int) -> None:
        """Lengthen `text`; not by a character that is incomplete."""
        self._window.append(token_id)
        added = self._added()
        if added and not added.endswith(_UNFINISHED):
            self.text += added
            self._window = self._window[self._num_told :] if self._num_told < len(self._window) else self._window
            self._num_told = len(self._window)

    def finish(self) -> str:
        """All the text, an incomplete character included."""
        return self.text + self._added()

    def _added(self) -> str:
        told = self._tokenizer.decode(self._window[: self._num_told])
        return self._tokenizer.decode(self._window)[len(told) :]


def last_text(tokenizer: ServedTokenizer, ids: Sequence[int], num_prompt: int, num_tokens: int) -> str:
    """Text of the last tokens of a row, as far as they are generated ones."""
    if len(ids) - num_tokens >= num_prompt:
        return tokenizer.decode(list(ids[-num_tokens:]))
    # The first generated token needs some of the prompt before it, or SentencePiece would drop its blank.
    before = list(ids[max(num_prompt - _CONTEXT, 0) : num_prompt])
    return tokenizer.decode([*before, *ids[num_prompt:]])[len(tokenizer.decode(before)) :]


def without_end(text: str, stops: Sequence[str], first: int = 0, *, keep: bool = False) -> str:
    """Text up to the first stop string that begins at character `first` or later; with `keep`, the string, too."""
    found = [(place, stop) for stop in stops if (place := text.find(stop, first)) >= 0]
    if not found:
        return text
    place, stop = min(found)
    return text[: place + len(stop) * keep]


def safe_length(text: str, ends: Sequence[str]) -> int:
    """Characters of `text` that no continuation can turn into a part of one of `ends`."""
    longest = max(map(len, ends), default=0)
    for length in range(min(longest, len(text)), 0, -1):
        if any(end.startswith(text[len(text) - length :]) for end in ends):
            return len(text) - length
    return len(text)


@lru_cache(maxsize=1 << 16)
def token_bytes(tokenizer: ServedTokenizer, token_id: int) -> bytes:
    """UTF-8 that a token adds in the middle of a text; for control tokens, nothing."""
    piece = tokenizer.id_to_piece(token_id)
    if byte := _BYTE_PIECE.fullmatch(piece):
        return bytes([int(byte[1], 16)])
    before = tokenizer.encode("a")
    text = tokenizer.decode([*before, token_id])[len(tokenizer.decode(before)) :]
    if _UNFINISHED in text and _UNFINISHED not in piece:  # a part of a character in a byte-level vocabulary
        from transformers.models.gpt2.tokenization_gpt2 import bytes_to_unicode

        byte_of = {char: byte for byte, char in bytes_to_unicode().items()}
        return bytes(byte_of[char] for char in piece)
    return text.encode()
