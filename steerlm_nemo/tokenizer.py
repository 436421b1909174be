"""Tokenizers as the data tools and the trainer need them, without NeMo.

SentencePiece puts a dummy space in front of a text. Inside a conversation only the first segment may have it:
`encode` keeps it, `encode_continuation` leaves it out.
"""

from __future__ import annotations

import copy
import json
import logging
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlm_nemo.errors import InputError
from steerlm_nemo.records import read_json, read_whole

if TYPE_CHECKING:
    import sentencepiece
    import tokenizers

logger = logging.getLogger(__name__)


class SentencePieceTokenizer:
    """A SentencePiece model, with BOS and EOS never added (NeMo's non-legacy sentencepiece tokenizer)."""

    def __init__(self, path: str | Path, model: bytes | None = None) -> None:
        """`model` is the content of the file, where that is at hand."""
        self._model = read_whole(path) if model is None else model
        self._start = load_sentencepiece(path, self._model)
        self._continuation = load_sentencepiece(path, self._model)
        self._continuation.override_normalizer_spec(add_dummy_prefix=False)
        self._encode_continuation: Callable[[str], list[int]] = self._continuation.encode
        self._encode: Callable[[str], list[int]] = self._start.encode
        if _words_stand_alone(self._model):
            by_word = self._encode_continuation = _WordByWord(self._continuation.encode)
            self._encode = lambda text: by_word(" " + text) if text else []
        self.path = str(path)
        self.bos_id: int = self._start.bos_id()
        self.eos_id: int = self._start.eos_id()
        self.vocab_size: int = self._start.get_piece_size()

    def for_template(self, markers: Sequence[str]) -> SentencePieceTokenizer:
        """Itself: the text of a control piece, such as EOS, never is that piece."""
        return self

    def encode(self, text: str) -> list[int]:
        return self._encode(text)

    def encode_continuation(self, text: str) -> list[int]:
        return self._encode_continuation(text)

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[str, bytes]]:
        # A pickled processor forgets that it puts no dummy space. The file may be gone: a .nemo is unpacked to a
        # folder for a while only.
        return SentencePieceTokenizer, (self.path, self._model)

    def ends(self, text: str, is_start: bool) -> list[int]:
        """Where in the text each token ends, in characters; of a character of several tokens the last has it."""
        processor = self._start if is_start else self._continuation
        return [piece.end for piece in processor.encode(text, out_type="immutable_proto").pieces]

    def decode(self, token_ids: list[int]) -> str:
        """Text of the ids; control pieces such as EOS decode to nothing."""
        return self._start.decode([i for i in token_ids if i < self.vocab_size])

    def id_to_piece(self, token_id: int) -> str:
        return self._start.id_to_piece(token_id) if token_id < self.vocab_size else f"<padding {token_id}>"

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of the tokens that no text becomes: control tokens and the unknown one."""
        model = self._start
        ids = (i for i in range(self.vocab_size) if model.is_control(i) or model.is_unknown(i))
        return {model.id_to_piece(i): i for i in ids}

    @property
    def special_names(self) -> dict[str, str]:
        """Text of the tokens that have a part, as transformers names it: `bos_token` and others."""
        model = self._start
        ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id(), "unk_token": model.unk_id()}
        return {name: model.id_to_piece(token_id) for name, token_id in ids.items() if token_id >= 0}


class _WordByWord:
    """Ids of a text put together from those of its words, each asked for once.

    Exact where `_words_stand_alone`. SentencePiece's BPE takes some 0.4 ms per 1,000 characters, a look-up 0.1 ms.
    """

    MOST_WORDS = 1 << 16  # some 20 MB
    LONGEST_WORD = 64  # characters; longer ones are hardly seen twice

    _split = re.compile("\n+|[ \u2581]*[^ \u2581\n]+|[ \u2581]+").findall

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._known: dict[str, list[int]] = {}

    def __call__(self, text: str) -> list[int]:
        known, ids = self._known, []
        for word in self._split(text):
            word_ids = known.get(word)
            if word_ids is None:
                word_ids = self._encode(word)
                if len(word) <= self.LONGEST_WORD:
                    if len(known) >= self.MOST_WORDS:
                        known.clear()
                    known[word] = word_ids
            ids += word_ids
        return ids


def _words_stand_alone(model_file: bytes) -> bool:
    """Whether no piece spans two words, and nothing else makes the ids of a word depend on its neighbours.

    BPE joins neighbours only into pieces of the vocabulary. So where no piece has a space after another character, or
    a line end beside another character, a text falls apart there (as with Llama 2). Other models are asked for whole
    texts: unigram models weigh a text as a whole, normalisation may look across, unknown characters may be joined.
    """
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(model_file)
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    is_plain_bpe = (
        trainer.model_type == trainer.BPE and trainer.byte_fallback and not trainer.treat_whitespace_as_suffix
    )
    keeps_text = not normalizer.precompiled_charsmap and not normalizer.remove_extra_whitespaces
    keeps_text = keeps_text and normalizer.escape_whitespaces and normalizer.add_dummy_prefix
    spans_words = re.compile("[^ \u2581][ \u2581]|[^\n]\n|\n[^\n]").search
    return is_plain_bpe and keeps_text and not any(spans_words(piece.piece) for piece in model.pieces)


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer, loaded from a folder, a `tokenizer.json`, or by name what was fetched before.

    The text of a special token is that token, as with transformers; in conversations see `for_template`. Of a folder
    whose class the installed transformers cannot make (`TokenizersBackend` of transformers 5, code of the folder's own)
    tokenizer.json is read as it is, with a warning, unless `as_named`. Raises InputError.
    """

    def __init__(
        self, name_or_path: str | Path, extra_special_tokens: tuple[str, ...] = (), *, as_named: bool = False
    ) -> None:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        path = Path(name_or_path)
        try:
            if not path.exists() and path.is_absolute():
                raise InputError(f"{path}: no such file or folder")
            if path.suffix == ".json" and path.is_file():
                self._tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
            else:
                try:
                    self._tokenizer = AutoTokenizer.from_pretrained(
                        str(name_or_path), use_fast=True, trust_remote_code=False, local_files_only=True
                    )
                except Exception as err:
                    if as_named or not (path / "tokenizer.json").is_file():
                        raise
                    self._tokenizer = _without_its_class(path)
                    logger.warning(
                        "%s: tokenizer.json is read as it is, since its class is not known here: %s", path, err
                    )
        except InputError:
            raise
        except Exception as err:  # bare ones for a cut file, others for lists instead of maps
            if not path.exists():
                raise InputError(
                    f"{name_or_path}: no such file or folder, and no tokenizer of this name on this machine; none is "
                    f"ever fetched unasked. With a network, `huggingface-cli download {name_or_path} --include "
                    "'tokenizer*' 'special_tokens*'` fetches one of the Hugging Face Hub"
                ) from err
            raise InputError(f"{name_or_path}: cannot load a Hugging Face tokenizer from here: {err}") from err
        if extra_special_tokens:
            self._tokenizer.add_special_tokens({"additional_special_tokens": list(extra_special_tokens)})
        self.path = str(name_or_path)
        self.bos_id: int | None = self._tokenizer.bos_token_id
        self.eos_id: int = self._tokenizer.eos_token_id
        self.vocab_size: int = len(self._tokenizer)
        self.is_fast: bool = self._tokenizer.is_fast
        self._backend: Any = None
        self._markers: tuple[str, ...] | None = None  # of the template whose content is text, see for_template
        self._of_template: dict[tuple[str, ...], HuggingFaceTokenizer] = {}
        if self.is_fast:
            # Asked for directly below, in two thirds of the time; what the Python around it does at every call is
            # undone here once: a tokenizer.json may ask for a maximal length and for padding.
            self._backend = self._tokenizer.backend_tokenizer
            self._backend.no_truncation()
            self._backend.no_padding()

    def for_template(self, markers: Sequence[str]) -> HuggingFaceTokenizer:
        """The same for conversations: what people and models say is text, even where it spells a special token.

        `</s>` in a message would be EOS else, in a question as in a response. Markers stay the tokens they are.
        """
        key = tuple(markers)
        if key not in self._of_template:
            one = copy.copy(self)
            one._markers = tuple(marker for marker in key if marker in self._tokenizer.all_special_tokens)
            if self.is_fast:
                spec = json.loads(self._backend.to_str())
                for token in spec.get("added_tokens") or ():
                    token["special"] = token["special"] and token["content"] not in one._markers
                one._backend = type(self._backend).from_str(json.dumps(spec))
                one._backend.encode_special_tokens = True
            self._of_template[key] = one
        return self._of_template[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_of_template": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.is_fast and self._markers is not None:
            self._backend.encode_special_tokens = True  # no part of what tokenizers pickles

    def encode(self, text: str) -> list[int]:
        if self.is_fast:
            return self._backend.encode(text, add_special_tokens=False).ids
        if self._markers is None:
            return self._tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for part in re.split("(" + "|".join(map(re.escape, self._markers)) + ")", text) if self._markers else [text]:
            special = part not in self._markers
            ids += self._tokenizer.encode(part, add_special_tokens=False, split_special_tokens=special) if part else []
        return ids

    encode_continuation = encode

    def ends(self, text: str, is_start: bool) -> list[int]:
        """Where in the text each token ends, in characters.

        Raises:
            InputError: not a fast tokenizer; the others do not know.
        """
        if not self.is_fast:
            raise InputError(f"{self.path}: this tokenizer cannot say which text a token stands for (it is not fast)")
        return [end for _, end in self._backend.encode(text, add_special_tokens=False).offsets]

    def decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=True)

    def id_to_piece(self, token_id: int) -> str:
        return self._tokenizer.convert_ids_to_tokens(token_id)

    @cached_property
    def special_tokens(self) -> dict[str, int]:
        """Text and id of the special tokens, each of which its own text becomes."""
        added = self._tokenizer.added_tokens_decoder.items()
        return {token.content: token_id for token_id, token in added if token.special}

    @property
    def special_names(self) -> dict[str, str | list[str]]:
        """Text of the tokens that have a part, as transformers names it: `bos_token` and others."""
        return dict(self._tokenizer.special_tokens_map)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """What a fast tokenizer really is."""
        return self._tokenizer.backend_tokenizer


def _without_its_class(folder: Path) -> Any:
    """tokenizer.json of a folder, with the parts that tokenizer_config.json gives to tokens. Raises as transformers."""
    from transformers import PreTrainedTokenizerFast

    config_file = folder / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    named = {part: config.get(part) for part in PreTrainedTokenizerFast.SPECIAL_TOKENS_ATTRIBUTES}
    parts = {part: token["content"] if isinstance(token, dict) else token for part, token in named.items()}
    texts = {part: token for part, token in parts.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False, **texts
    )


def load_sentencepiece(path: str | Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    """A processor of a model's bytes; `path` is for messages. Raises InputError."""
    import sentencepiece

    if not model:  # taken for no model at all, and asked for an id it crashes
        raise InputError(f"{path}: not a SentencePiece model (an empty file)")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model)
    except (RuntimeError, UnicodeDecodeError) as err:  # the latter while reporting a damaged piece
        raise InputError(f"{path}: not a SentencePiece model ({err})") from err
