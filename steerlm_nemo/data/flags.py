"""Which tokenizer and which markers: the flags that `data_clean.py` and the tools that look at data have in common."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING

from steerlm_nemo.errors import InputError
from steerlm_nemo.records import unreadable
from steerlm_nemo.template import EXTRA_ID_TEMPLATE, ChatTemplate

if TYPE_CHECKING:
    from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

MARKERS = [marker.name for marker in fields(ChatTemplate)]


def add_tokenizer_flags(add: Callable[..., None]) -> None:
    """The reference's three flags."""
    add("library", default="huggingface", choices=("huggingface", "sentencepiece"), help="kind of tokenizer")
    add("model_file", help="SentencePiece model")
    add("model_name", default="EleutherAI/gpt-neox-20b", help="Hugging Face tokenizer: a name or a folder")


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
    from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

    if args.library is None:  # a tool without the reference's default
        args.library = "sentencepiece" if args.model_file else "huggingface"
    if args.library == "huggingface" and args.model_name is None:
        raise InputError(
            "give a tokenizer: --model_file, a SentencePiece model, or --model_name, a Hugging Face folder"
        )
    if args.library == "sentencepiece" and args.model_file is None:
        raise InputError("--library=sentencepiece needs --model_file, the tokenizer.model of the base model")
    try:
        if args.library == "sentencepiece":
            return SentencePieceTokenizer(args.model_file)
        # As in NeMo: a byte-level vocabulary has no such piece, so the markers become one token each.
        return HuggingFaceTokenizer(args.model_name, template.markers if template == EXTRA_ID_TEMPLATE else ())
    except PermissionError as err:
        raise unreadable(err.filename or args.model_file or args.model_name, err) from err
