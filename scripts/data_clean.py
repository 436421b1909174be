r"""Leave out the records that training could not learn from (run after preprocessing and after annotation).

    python scripts/data_clean.py --dataset_file=data/oasst_train.jsonl --output_file=data/oasst_train_clean.jsonl \
        --library=sentencepiece --model_file=tokenizer.model --seq_len=4096
"""

import argparse
import sys
from collections.abc import Sequence

from steerlm_nemo.data.flags import (
    add_template_flags,
    add_tokenizer_flags,
    choose_template,
    load_tokenizer,
)
from steerlm_nemo.errors import InputError, exit_with_message
from steerlm_nemo.flags import Flags


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Flags(__doc__)

    add = parser.flag
    add("dataset_file", required=True, help="records, .jsonl or .jsonl.gz")
    add("output_file", required=True, help="the records that stay; rejected ones go to OUTPUT_FILE.rejects.jsonl")
    add_tokenizer_flags(add)
    add("seq_len", type=int, default=4096, help="tokens that training will see of a conversation")
    add_template_flags(add)
    add(
        "trim_turns",
        action="store_true",
        help="cut off trailing turns that do not fit whole, down to the first target",
    )
    add("num_workers", type=int, default=1, help="processes that do the work; the output does not depend on it")
    add("report", help="a second JSON file for the counts, which always are in OUTPUT_FILE.report.json, too")
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
        args.dataset_file,
        args.output_file,
        cleaner,
        records,
        args.report,
        on_record,
        args.num_workers,
    )
    print(f"records: {records.summary()}\n{findings.summary()}", file=sys.stderr if args.compat else sys.stdout)


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
