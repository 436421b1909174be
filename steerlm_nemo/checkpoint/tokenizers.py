"""The tokenizer inside a `.nemo`, as our own class, and the files it consists of."""

from __future__ import annotations

from steerlm_nemo.checkpoint.archive import NemoFile
from steerlm_nemo.errors import CheckpointError
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer


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
