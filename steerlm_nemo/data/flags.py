"""Which tokenizer and which markers: the flags that `data_clean.py` and the tools that look at data have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING

from steerlm_nemo.errors import InputError
from steerlm_nemo.template import EXTRA_ID_TEMPLATE, ChatTemplate

if TYPE_CHECKING:
    from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

MARKERS = [marker.name for marker in fields(ChatTemplate)]


def add_tokenizer_flags(add: Callable[..., None]) -> None:
    """The reference's three flags, without its default of a tokenizer (EleutherAI/gpt-neox-20b)."""
    add("library", default="huggingface", choices=("huggingface", "sentencepiece"), help="kind of tokenizer")
    add("model_file", help="a SentencePiece model; with --library=huggingface a folder or a tokenizer.json")
    add("model_name", help="instead: a Hugging Face tokenizer by name, fetched before, or its folder")


def add_template_flags(add: Callable[..., None]) -> None:
    """Where the markers come from; for `choose_template`."""
    add("template_from", help="take the markers from this .nemo, model_config.yaml or training YAML")
    for marker in MARKERS:
        add(marker, help=rf"a marker, for example '\x11'; default {getattr(ChatTemplate(), marker)!r}")


def choose_template(args: argparse.Namespace) -> ChatTemplate:
    """From --template_from, or from single flags, or what --compat or our own training configs have."""
    from steerlm_nemo.checkpoint.template import template_from

    flags = {marker: getattr(args, marker) for marker in MARKERS if getattr(args, marker) is not None}
    if bool(flags) + bool(args.template_from) + bool(args.compat) > 1:
        raise InputError(
            "the markers come from one of: --template_from, --compat, or single flags such as --turn_start"
        )
    if args.template_from:
        return template_from(args.template_from)
    if args.compat:
        return EXTRA_ID_TEMPLATE
    return ChatTemplate.from_config(flags, warn=lambda message: print(message, file=sys.stderr))


def load_tokenizer(args: argparse.Namespace, template: ChatTemplate) -> SentencePieceTokenizer | HuggingFaceTokenizer:
    """The tokenizer that the flags name, for conversations of this template.

    Raises:
        InputError: they name none, or two, or one of the other library.
    """
    from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

    library, source = _tokenizer_source(args)
    if library == "sentencepiece":
        return SentencePieceTokenizer(source)
    # As in NeMo: a byte-level vocabulary has no such piece, so the markers become one token each.
    extra = template.markers if template == EXTRA_ID_TEMPLATE else ()
    return HuggingFaceTokenizer(source, extra).for_template(astuple(template))


def _tokenizer_source(args: argparse.Namespace) -> tuple[str, str]:
    """The library, and the file, folder or name. Raises InputError where they do not fit each other."""
    library, file, name = args.library, args.model_file, args.model_name
    if library == "sentencepiece" and file is None and name is None:
        raise InputError("--library=sentencepiece needs --model_file, the tokenizer.model of the base model")
    if file is None and name is None:
        raise InputError(
            "give the tokenizer of the model to be trained: --model_file, a SentencePiece model (with "
            "--library=sentencepiece) or a Hugging Face folder, or --model_name, a Hugging Face tokenizer by name"
        )
    if file is not None and name is not None:
        raise InputError(f"--model_file {file} and --model_name {name} are two tokenizers; give one of them")
    source = str(file if file is not None else name)
    is_folder = Path(source).is_dir()
    is_hugging_face = is_folder or source.endswith(".json")
    if library is None:  # a tool without the reference's default
        library = "huggingface" if file is None or is_hugging_face else "sentencepiece"
    if library == "sentencepiece" and name is not None:
        raise InputError(f"--model_name {name} is of --library=huggingface; --library=sentencepiece needs --model_file")
    if library == "sentencepiece" and is_hugging_face:
        model = Path(source) / "tokenizer.model"
        better = f"--model_file={model}" if model.is_file() else f"--library=huggingface --model_file={source}"
        raise InputError(f"{source} is no SentencePiece model but {_what(is_folder)}; give {better}")
    if library == "huggingface" and not is_hugging_face and Path(source).exists():
        raise InputError(
            f"{source} is neither the folder of a Hugging Face tokenizer nor a tokenizer.json; if it is a "
            f"SentencePiece model, give --library=sentencepiece --model_file={source}"
        )
    return library, source


def _what(is_folder: bool) -> str:
    return "a folder" if is_folder else "a Hugging Face file"
