"""Tokenizers as the data tools and the trainer need them, without NeMo.

SentencePiece puts a dummy space in front of a text. Inside a conversation only the first segment may have it:
`encode` keeps it, `encode_continuation` leaves it out.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlm_nemo.errors import InputError

if TYPE_CHECKING:
    import sentencepiece


class SentencePieceTokenizer:
    """A SentencePiece model, with BOS and EOS never added (NeMo's non-legacy sentencepiece tokenizer)."""

    def __init__(self, path: str | Path) -> None:
        self._start = _load_sentencepiece(path)
        self._continuation = _load_sentencepiece(path)
        self._continuation.override_normalizer_spec(add_dummy_prefix=False)
        self.path = str(path)
        self.bos_id: int = self._start.bos_id()
        self.eos_id: int = self._start.eos_id()
        self.vocab_size: int = self._start.get_piece_size()

    def encode(self, text: str) -> list[int]:
        return self._start.encode(text)

    def encode_continuation(self, text: str) -> list[int]:
        return self._continuation.encode(text)

    def decode(self, token_ids: list[int]) -> str:
        """Text of the ids; control pieces such as EOS decode to nothing."""
        return self._start.decode([i for i in token_ids if i < self.vocab_size])

    def id_to_piece(self, token_id: int) -> str:
        return self._start.id_to_piece(token_id) if token_id < self.vocab_size else f"<padding {token_id}>"


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer, loaded from a folder or a local `tokenizer.json`."""

    def __init__(self, name_or_path: str | Path, extra_special_tokens: tuple[str, ...] = ()) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        path = Path(name_or_path)
        try:
            if path.suffix == ".json" and path.is_file():
                self._tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
            else:
                self._tokenizer = AutoTokenizer.from_pretrained(str(name_or_path), use_fast=True)
        except (OSError, ValueError) as err:
            raise InputError(f"{name_or_path}: cannot load a Hugging Face tokenizer from here: {err}") from err
        if extra_special_tokens:
            self._tokenizer.add_special_tokens({"additional_special_tokens": list(extra_special_tokens)})
        self.path = str(name_or_path)
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_id: int = self._tokenizer.eos_token_id
        self.vocab_size: int = len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    encode_continuation = encode

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def id_to_piece(self, token_id: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(token_id)


def _load_sentencepiece(path: str | Path) -> sentencepiece.SentencePieceProcessor:
    import sentencepiece

    if not Path(path).is_file():
        raise InputError(f"{path}: no such SentencePiece model file")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, UnicodeDecodeError) as err:  # the latter while reporting a damaged piece
        raise InputError(f"{path}: not a SentencePiece model ({err})") from err
