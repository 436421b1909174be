r"""Leave out the records that training could not learn from (run after preprocessing and after annotation).

    python scripts/data_clean.py --dataset_file=data/oasst_train.jsonl --output_file=data/oasst_train_clean.jsonl \
        --library=sentencepiece --model_file=tokenizer.model --seq_len=4096
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from steerlm_nemo.errors import InputError, exit_with_message
from steerlm_nemo.template import EXTRA_ID_TEMPLATE, ChatTemplate, Tokenizer

MARKERS = [marker.name for marker in fields(ChatTemplate)]


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, **options: object) -> None:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, dest=name, **options)  # type: ignore[arg-type]

    add("dataset_file", required=True, help="records, .jsonl or .jsonl.gz")
    add("output_file", required=True, help="the records that stay; rejected ones go to OUTPUT_FILE.rejects.jsonl")
    add("library", default="huggingface", choices=("huggingface", "sentencepiece"), help="kind of tokenizer")
    add("model_file", help="SentencePiece model")
    add("model_name", default="EleutherAI/gpt-neox-20b", help="Hugging Face tokenizer: a name or a folder")
    add("seq_len", type=int, default=4096, help="tokens that training will see of a conversation")
    add("template_from", help="take the markers from this .nemo, model_config.yaml or training YAML")
    for marker in MARKERS:
        add(marker, help=rf"a marker, for example '\x11'; default {getattr(ChatTemplate(), marker)!r}")
    add(
        "trim_turns",
        action="store_true",
        help="cut off trailing turns that do not fit whole, down to the first target",
    )
    add("num_workers", type=int, default=1, help="processes that do the work; the output does not depend on it")
    add("report", help="JSON file for the counts")
    add("strict", action="store_true", help="stop at the first unusable record")
    add("compat", choices=("nemo1.23",), help="markers <extra_id_0/1/2> and standard output as NeMo's")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from steerlm_nemo.data.cleaning import Cleaner, clean_file
    from steerlm_nemo.records import Accounting, require_file

    require_file(args.dataset_file)
    for flag in ("seq_len", "num_workers"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag} is {getattr(args, flag)}; it must be 1 or more")
    template = choose_template(args)
    cleaner = Cleaner(template, load_tokenizer(args, template), args.seq_len, args.trim_turns)
    records = Accounting.beside(args.output_file, strict=args.strict)
    on_record = print_as_nemo if args.compat else lambda index, reason: None
    findings = clean_file(
        args.dataset_file, args.output_file, cleaner, records, args.report, on_record, args.num_workers
    )
    print(f"records: {records.summary()}\n{findings.summary()}", file=sys.stderr if args.compat else sys.stdout)


def choose_template(args: argparse.Namespace) -> ChatTemplate:
    """From --template_from, or from single flags, or what --compat or our own training configs have."""
    from steerlm_nemo.data.cleaning import template_from

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


def load_tokenizer(args: argparse.Namespace, template: ChatTemplate) -> Tokenizer:
    from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

    if args.library == "huggingface":
        # As in NeMo: a byte-level vocabulary has no such piece, so the markers become one token each.
        return HuggingFaceTokenizer(args.model_name, template.markers if template == EXTRA_ID_TEMPLATE else ())
    if args.model_file is None:
        raise InputError("--library=sentencepiece needs --model_file, the tokenizer.model of the base model")
    return SentencePieceTokenizer(args.model_file)


def print_as_nemo(index: int, reason: str | None) -> None:
    """The lines NeMo's data_clean prints, and no others."""
    from steerlm_nemo.data.cleaning import TARGET_BEYOND

    if index % 1000 == 0:
        print(index)
    if reason == TARGET_BEYOND:
        print(f"removed {index}")
    elif reason is not None:
        print(f"Exception removed {index}")


if __name__ == "__main__":
    exit_with_message(main)
