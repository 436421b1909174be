"""The tokenizer that travels with a checkpoint, found by its files and packed under stable names.

Two kinds: a SentencePiece `tokenizer.model`, which stock NeMo resolves inside the archive, and a Hugging Face
`tokenizer.json`. Stock NeMo looks for the latter by hub name or folder only, so a loader points
`tokenizer.type` at the extracted folder (`localise_tokenizer`); nothing is ever fetched by name.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlm_nemo.checkpoint.archive import NemoFile
from steerlm_nemo.checkpoint.beside import json_of, read_if_there
from steerlm_nemo.checkpoint.chat_template import CHAT_TEMPLATE, TOKENIZER_CONFIG, chat_template_of
from steerlm_nemo.errors import CheckpointError, InputError
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_sentencepiece

SENTENCEPIECE, HUGGINGFACE = "tokenizer.model", "tokenizer.json"
_COMPANIONS = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE)
PACKED_NAMES = (SENTENCEPIECE, HUGGINGFACE, *_COMPANIONS)
_OF_A_CLASS = ("tokenizer_class", "auto_map", "backend", "extra_special_tokens")  # of tokenizer_config.json
# Where classes differ: the first space, runs of spaces, line ends, digits, accents, other scripts, our own markers.
_SAMPLES = (
    "Hello, world",
    " a space first,  two within, one at the end ",
    "line\n\nline\r\n\ttab",
    "It's 31,415.9 - I'll don't",
    "Zoë naïve Straße 你好 こんにちは Привет \U0001f600",
    "<extra_id_1>Assistant\n<extra_id_2>quality:4,toxicity:0\n",
    "<s>[INST] </s><|im_start|><|eot_id|>",
)


@dataclass(frozen=True)
class TokenizerFiles:
    library: str  # as NeMo's `tokenizer.library`: sentencepiece or huggingface
    size: int  # number of tokens, as NeMo counts them
    files: dict[str, bytes]  # member name -> content
    notes: tuple[str, ...] = ()  # what the user should know of the choice

    @property
    def num_rows(self) -> int:
        """How many rows of an embedding its ids reach."""
        if self.library == "sentencepiece":
            return self.size
        return max(self.size, tokenizer_json_size(HUGGINGFACE, self.files[HUGGINGFACE]))

    def nemo_config(self) -> dict[str, Any]:
        """The `tokenizer` section of `model_config.yaml`."""
        is_sentencepiece = self.library == "sentencepiece"
        return {
            "library": self.library,
            "type": None if is_sentencepiece else f"nemo:{HUGGINGFACE}",
            "model": f"nemo:{SENTENCEPIECE if is_sentencepiece else HUGGINGFACE}",
            "vocab_file": None,
            "merge_file": None,
            "delimiter": None,
            "sentencepiece_legacy": False,
            "use_fast": not is_sentencepiece,
        }


def find_tokenizer(folder: Path) -> TokenizerFiles:
    """The tokenizer of a Hugging Face folder; `tokenizer.model` wins where both are there, as in the reference.

    Not where it is no SentencePiece model: Llama 3's file of that name is tiktoken's.

    Raises:
        InputError: there is none, its file is damaged, or nothing would load what is packed of it.
    """
    found_files = {name: read_if_there(folder / name) for name in PACKED_NAMES}
    files = {name: data for name, data in found_files.items() if data is not None}
    chosen = _choose(folder, files)
    return dataclasses.replace(chosen, notes=(*chosen.notes, *_notes_on_template(folder, files)))


def _notes_on_template(folder: Path, files: dict[str, bytes]) -> tuple[str, ...]:
    notes = []
    try:
        named = json_of(folder / TOKENIZER_CONFIG, files.get(TOKENIZER_CONFIG, b"{}")).get("chat_template")
        if chat_template_of(files, "") is None and named:
            notes.append(f"chat_template of {TOKENIZER_CONFIG} has no default template; it is carried, but not used")
    except CheckpointError as err:
        notes.append(f"its chat template is carried as it is, but cannot be used: {err}")
    if others := sorted(path.name for path in folder.glob("additional_chat_templates/*")):
        notes.append(f"not carried over: additional_chat_templates ({', '.join(others)})")
    return tuple(notes)


def _choose(folder: Path, files: dict[str, bytes]) -> TokenizerFiles:
    if SENTENCEPIECE in files:
        try:
            model = load_sentencepiece(folder / SENTENCEPIECE, files[SENTENCEPIECE])
        except InputError:
            if HUGGINGFACE not in files:
                raise
            del files[SENTENCEPIECE]
            found = _of_tokenizer_json(folder, files)
            note = f"{HUGGINGFACE} is used: {SENTENCEPIECE} is not a SentencePiece model"
            return dataclasses.replace(found, notes=(note, *found.notes))
        added = _added_tokens(folder, files)
        unknown = {
            token: token_id
            for token, token_id in added.items()
            if token_id >= model.get_piece_size() or model.id_to_piece(token_id) != token
        }
        return TokenizerFiles("sentencepiece", model.get_piece_size(), files, _notes_on(unknown, files))
    if HUGGINGFACE not in files:
        raise InputError(f"{folder}: has neither {SENTENCEPIECE} nor {HUGGINGFACE}; copy the model's tokenizer there")
    return _of_tokenizer_json(folder, files)


def _added_tokens(folder: Path, files: dict[str, bytes]) -> dict[str, int]:
    """The tokens that the files beside a tokenizer.model add to it, with their ids."""
    contents = {name: json_of(folder / name, files[name]) for name in (*_COMPANIONS[:3], HUGGINGFACE) if name in files}
    try:
        added: dict[str, int] = dict(contents.get("added_tokens.json", {}))
        decoder = contents.get(TOKENIZER_CONFIG, {}).get("added_tokens_decoder") or {}
        added |= {token["content"]: int(token_id) for token_id, token in decoder.items()}
        listed = contents.get(HUGGINGFACE, {}).get("added_tokens") or []
        added |= {token["content"]: int(token["id"]) for token in listed}
        if wrong := [token for token, token_id in added.items() if type(token_id) is not int or token_id < 0]:
            raise TypeError(f"the id of {wrong[0]!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise InputError(f"{folder}: its added tokens are malformed ({err!r}) in one of {', '.join(contents)}") from err
    return added


def _notes_on(unknown: dict[str, int], files: dict[str, bytes]) -> tuple[str, ...]:
    if not unknown:
        return ()
    first = [f"{token} ({token_id})" for token, token_id in sorted(unknown.items(), key=lambda item: item[1])]
    shown = ", ".join(first[:6]) + (f" and {len(first) - 6} more" if len(first) > 6 else "")
    cure = f"Remove {SENTENCEPIECE} to use {HUGGINGFACE}" if HUGGINGFACE in files else f"A {HUGGINGFACE} has them"
    if HUGGINGFACE not in files:
        cure += f": save one with transformers' fast tokenizer, and remove {SENTENCEPIECE}"
    return (f"{SENTENCEPIECE} is used, so these added tokens are ordinary text for NeMo: {shown}. {cure}.",)


def _of_tokenizer_json(folder: Path, files: dict[str, bytes]) -> TokenizerFiles:
    """A tokenizer.json and its companions."""
    size = len(_ids_of_json(str(folder / HUGGINGFACE), files[HUGGINGFACE]))
    if importlib.util.find_spec("transformers") is None:
        files.setdefault(TOKENIZER_CONFIG, b'{"tokenizer_class": "PreTrainedTokenizerFast"}')
        note = f"{HUGGINGFACE} is packed without having been loaded: transformers is not installed here"
        return TokenizerFiles("huggingface", size, files, (note,))
    return _loadable(folder, files)


def _loadable(folder: Path, files: dict[str, bytes]) -> TokenizerFiles:
    """What to pack so that transformers loads it by itself and makes the tokens that the source makes.

    transformers 5 names classes that 4 has not; where no class is named transformers guesses one by the model; and a
    class may bring tokens that no file has, such as an unknown token, for which the model has no row. Then
    tokenizer.json is read as it is: it holds the whole tokenizer but for which tokens begin and end a text.
    """
    declared = len({**_ids_of_json(str(folder / HUGGINGFACE), files[HUGGINGFACE]), **_added_tokens(folder, files)})
    plain_config, names_a_class = _plain_config(folder / TOKENIZER_CONFIG, files)
    source, reason = _load(folder) if names_a_class else (None, "")
    if source is not None:
        expected = [source.encode(text) for text in _SAMPLES]
    else:
        expected = _tokens_of_json(folder / HUGGINGFACE, files[HUGGINGFACE])
    plain = {**files, TOKENIZER_CONFIG: plain_config}
    fitting: list[tuple[int, dict[str, bytes]]] = []
    for candidate in (files, plain):
        with tempfile.TemporaryDirectory(prefix="tokenizer-") as packed:
            for name, data in candidate.items():
                Path(packed, name).write_bytes(data)
            tokenizer, failure = _load(Path(packed))
        if tokenizer is None:
            reason = reason or failure
        elif [tokenizer.encode(text) for text in _SAMPLES] != expected:
            reason = "it makes other tokens than the source"
        elif source is None or tokenizer.eos_id == source.eos_id:
            fitting.append((tokenizer.vocab_size, candidate))
            if tokenizer.vocab_size <= declared:
                break
        else:
            reason = f"its texts end in token {tokenizer.eos_id}, those of the source in {source.eos_id}"
    if fitting:
        size, chosen = min(fitting, key=lambda pair: pair[0])
        notes: tuple[str, ...] = ()
        if chosen is plain:
            why = "a class that adds tokens which no file has" if source is not None else "no class that loads here"
            notes = (f"{TOKENIZER_CONFIG} names {why}; {HUGGINGFACE} is read as it is",)
        return TokenizerFiles("huggingface", size, chosen, notes)
    raise InputError(
        f"{folder / TOKENIZER_CONFIG}: what would be packed of this tokenizer does not load as it should: {reason}. "
        'Set tokenizer_class to "PreTrainedTokenizerFast", or save the tokenizer with the installed transformers.'
    )


def _load(folder: Path) -> tuple[HuggingFaceTokenizer | None, str]:
    """The fast tokenizer of a folder, or why there is none."""
    try:
        tokenizer = HuggingFaceTokenizer(folder, as_named=True)  # as stock NeMo would
    except InputError as err:
        return None, str(err.__cause__ or err)  # which names a temporary folder
    return (tokenizer, "") if tokenizer.is_fast else (None, "its class does not read tokenizer.json")


def _tokens_of_json(path: Path, data: bytes) -> list[list[int]]:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(data)
    except Exception as err:  # the library raises nothing narrower
        raise InputError(
            f"{path}: tokenizers {tokenizers.__version__} cannot read it: {err}. It is damaged, or made by a newer "
            "version: download it again, or save it with the installed one."
        ) from err
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [tokenizer.encode(text, add_special_tokens=False).ids for text in _SAMPLES]


def _plain_config(path: Path, files: dict[str, bytes]) -> tuple[bytes, bool]:
    """tokenizer_config.json for the class that takes tokenizer.json as it is, and whether it named a class before."""
    config = json_of(path, files.get(TOKENIZER_CONFIG, b"{}"))
    extra = config.get("extra_special_tokens")
    kept = {key: value for key, value in config.items() if key not in _OF_A_CLASS}
    if isinstance(extra, list):  # as transformers 5 writes what 4 calls additional_special_tokens
        kept.setdefault("additional_special_tokens", extra)
    plain = kept | {"tokenizer_class": "PreTrainedTokenizerFast"}
    return json.dumps(plain, indent=1).encode(), bool(config.get("tokenizer_class"))


def sentencepiece_facts(data: bytes, where: str) -> dict[str, Any]:
    """size, bos_id, eos_id, and the pieces bos, eos and unk of a SentencePiece model.

    Raises:
        InputError: the bytes are not a SentencePiece model.
    """
    model = load_sentencepiece(where, data)
    ids = {"bos": model.bos_id(), "eos": model.eos_id(), "unk": model.unk_id()}
    pieces = {name: model.id_to_piece(piece_id) if piece_id >= 0 else None for name, piece_id in ids.items()}
    return {"size": model.get_piece_size(), "bos_id": ids["bos"], "eos_id": ids["eos"], **pieces}


def tokenizer_json_size(where: str, data: bytes) -> int:
    """How many rows its ids reach: the largest id and one. Ids may have gaps, so it may have fewer tokens."""
    return max(_ids_of_json(where, data).values(), default=-1) + 1


def _ids_of_json(where: str, data: bytes) -> dict[str, int]:
    """Every distinct token with its id, added ones included."""
    try:
        tokenizer = json.loads(data)
        vocab = tokenizer["model"]["vocab"]
        ids = vocab if isinstance(vocab, dict) else {piece: token_id for token_id, (piece, _) in enumerate(vocab)}
        ids = ids | {token["content"]: token["id"] for token in tokenizer.get("added_tokens") or ()}
        if wrong := [token for token, token_id in ids.items() if type(token_id) is not int]:
            raise TypeError(f"the id of {wrong[0]!r}")
        return ids
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as err:
        raise InputError(f"{where}: not a Hugging Face tokenizer.json ({err!r})") from err


def localise_tokenizer(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The config with `tokenizer.type` pointing at `folder`, an extracted `.nemo`, where its tokenizer is packed."""
    tokenizer = config["tokenizer"]
    if tokenizer.get("type") != f"nemo:{HUGGINGFACE}":
        return config
    return {**config, "tokenizer": {**tokenizer, "type": str(folder)}}


def load_tokenizer(nemo: NemoFile) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    """The tokenizer that `model_config.yaml` names, whether packed in the archive or lying outside.

    Raises:
        CheckpointError: the config names none.
        InputError: the files it names are no tokenizer.
    """
    config = nemo.config.get("tokenizer") or {}
    if config.get("library") == "sentencepiece":
        packed = nemo.resolve(config.get("model"))
        return SentencePieceTokenizer(nemo.dir / packed if packed else str(config.get("model")))
    if config.get("library") == "huggingface":
        # The folder, not the file: tokenizer_config.json beside it says which tokens begin and end a text.
        packed = nemo.resolve(config.get("type"))
        return HuggingFaceTokenizer(nemo.dir if packed else str(config.get("type")))
    raise CheckpointError(f"{nemo.path}: model_config.yaml names no tokenizer (tokenizer.library: {config!r})")


def read_artifacts(nemo: NemoFile) -> dict[str, bytes]:
    """Every member beside config and weights, by name: what a fine-tuned copy must carry on."""
    return {
        name: nemo.read(name)
        for name in nemo.members
        if name != "model_config.yaml" and "/" not in name and not name.startswith("model_weights")
    }
