"""A rendered conversation as token ids: special tokens of the template count, the same texts in a message do not.

A template writes special tokens as text (`<|im_end|>`), and transformers and vLLM turn every such text into its token,
wherever it comes from: whoever may write one message can then end it and forge the next. Here a message's text is text.
Before a template renders it, each special token that it spells is broken by a character that nobody sends (`broken`),
and tokenised where it stands, without that character, it can only become ordinary tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from steerlm_nemo.errors import InputError
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

if TYPE_CHECKING:
    import tokenizers

_LAST = 0x10FFFD  # of the characters for private use


def breaker_for(strings: Iterable[str]) -> str:
    """A character that stands in none of these."""
    taken = set().union(*strings)
    return next(chr(code) for code in range(_LAST, 0, -1) if chr(code) not in taken)


class ChatTokens:
    """The special tokens of a model, and how a rendered conversation is tokenised.

    `spaced`: with SentencePiece, a text after a special token begins with a blank of its own (transformers' `legacy`).
    """

    def __init__(self, tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer, spaced: bool) -> None:
        self._tokenizer = tokenizer
        self._spaced = spaced
        self.special = tokenizer.special_tokens
        longest_first = sorted(filter(None, self.special), key=len, reverse=True)
        self._any_special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def spells_special(self, text: str) -> bool:
        return self._any_special.search(text) is not None

    def broken(self, text: str, breaker: str) -> str:
        """A message's text with every special token in it broken."""
        return self._any_special.sub(lambda found: found[0][0] + breaker + found[0][1:], text)

    def first_special(self, text: str) -> int | None:
        """The id of the first special token of a text."""
        found = self._any_special.search(text)
        return self.special[found[0]] if found else None

    def encode(self, rendered: str, breaker: str) -> list[int]:
        """Token ids of a rendered conversation; nothing is added in front.

        Raises:
            InputError: this tokenizer would take a broken text for the token all the same.
        """
        if isinstance(self._tokenizer, SentencePieceTokenizer):
            return self._encode_pieces(self._tokenizer, rendered, breaker)
        if breaker not in rendered:
            return self._tokenizer.encode(rendered)
        if not self._tokenizer.is_fast:
            raise InputError("a message spells a special token, which this model's tokenizer would take for the token")
        ids = _without(self._tokenizer, breaker).encode(rendered, add_special_tokens=False).ids
        meant = len(self._any_special.findall(rendered))
        if sum(token_id in self._special_ids for token_id in ids) > meant:
            raise InputError("a message spells a special token, which this model's tokenizer would take for the token")
        return ids

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        """Without the unknown token, which ordinary text may become."""
        unknown = self._tokenizer.special_names.get("unk_token")
        return frozenset(token_id for text, token_id in self.special.items() if text != unknown)

    def _encode_pieces(self, tokenizer: SentencePieceTokenizer, rendered: str, breaker: str) -> list[int]:
        """SentencePiece never makes a special token of a text: they are put between the texts."""
        ids: list[int] = []
        start = 0
        for found in (*self._any_special.finditer(rendered), None):
            text = rendered[start : found.start() if found else None].replace(breaker, "")
            ids += tokenizer.encode(text) if start == 0 or self._spaced else tokenizer.encode_continuation(text)
            if found:
                ids.append(self.special[found[0]])
                start = found.end()
        return ids


@functools.lru_cache(maxsize=2)
def _without(tokenizer: HuggingFaceTokenizer, breaker: str) -> tokenizers.Tokenizer:
    """The same tokenizer, but for dropping a character after the special tokens of a text have been found."""
    import tokenizers
    from tokenizers import normalizers

    made = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    drop: Any = normalizers.Replace(breaker, "")
    made.normalizer = normalizers.Sequence([drop, *([made.normalizer] if made.normalizer else [])])
    return made


def broken_in(value: Any, tokens: ChatTokens, breaker: str) -> Any:
    """A message with every special token that one of its texts spells broken, at any depth."""
    if isinstance(value, str):
        return tokens.broken(value, breaker)
    if isinstance(value, Mapping):
        return {key: broken_in(item, tokens, breaker) for key, item in value.items()}
    if isinstance(value, list):
        return [broken_in(item, tokens, breaker) for item in value]
    return value


def texts_in(value: Any) -> Iterable[str]:
    """Every text of a message, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield key
            yield from texts_in(item)
    elif isinstance(value, list):
        for item in value:
            yield from texts_in(item)
