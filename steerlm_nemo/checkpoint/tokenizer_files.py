"""The tokenizer that travels with a checkpoint, found by its files and packed under stable names.

Two kinds: a SentencePiece `tokenizer.model`, which stock NeMo resolves inside the archive, and a Hugging Face
`tokenizer.json`. Stock NeMo looks for the latter by hub name or folder only, so a loader points
`tokenizer.type` at the extracted folder (`localise_tokenizer`); nothing is ever fetched by name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlm_nemo.checkpoint.archive import NemoFile
from steerlm_nemo.errors import CheckpointError, InputError
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer, load_sentencepiece

SENTENCEPIECE, HUGGINGFACE = "tokenizer.model", "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
_COMPANIONS = (TOKENIZER_CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
PACKED_NAMES = (SENTENCEPIECE, HUGGINGFACE, *_COMPANIONS)


@dataclass(frozen=True)
class TokenizerFiles:
    library: str  # as NeMo's `tokenizer.library`: sentencepiece or huggingface
    size: int  # number of tokens, as NeMo counts them
    files: dict[str, bytes]  # member name -> content

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

    Raises:
        InputError: there is none, or its file is damaged.
    """
    files = {name: (folder / name).read_bytes() for name in _COMPANIONS if (folder / name).is_file()}
    if (folder / HUGGINGFACE).is_file():
        files[HUGGINGFACE] = (folder / HUGGINGFACE).read_bytes()
    if (folder / SENTENCEPIECE).is_file():
        files[SENTENCEPIECE] = (folder / SENTENCEPIECE).read_bytes()
        size = sentencepiece_facts(files[SENTENCEPIECE], str(folder / SENTENCEPIECE))["size"]
        return TokenizerFiles("sentencepiece", size, files)
    if HUGGINGFACE not in files:
        raise InputError(f"{folder}: has neither {SENTENCEPIECE} nor {HUGGINGFACE}; copy the model's tokenizer there")
    # Without a class name transformers cannot tell which tokenizer a folder holds.
    files.setdefault(TOKENIZER_CONFIG, b'{"tokenizer_class": "PreTrainedTokenizerFast"}')
    return TokenizerFiles("huggingface", tokenizer_json_size(str(folder / HUGGINGFACE), files[HUGGINGFACE]), files)


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
    """Number of distinct tokens, added ones included: `len()` of the loaded tokenizer."""
    try:
        tokenizer = json.loads(data)
        vocab = tokenizer["model"]["vocab"]
        tokens = set(vocab) if isinstance(vocab, dict) else {piece for piece, _ in vocab}
        return len(tokens | {token["content"] for token in tokenizer.get("added_tokens") or ()})
    except (ValueError, KeyError, TypeError) as err:
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
