r"""Look at data before training on it: lengths, truncation, attributes, languages, duplicates, what files share.

    python scripts/inspect_data.py data/oasst_train.jsonl data/oasst_val.jsonl --model_file tokenizer.model \
        --html data.html

Takes whatever preprocessing.py reads: datasets as they are published, and training records. Give several files, for
example the two sides of a split, to compare them and to see what they share. Tokens are counted with a tokenizer only.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

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
    parser.add_argument("files", nargs="+", help="JSON lines, a JSON array, Parquet, a directory, hf://owner/name")
    add = parser.flag
    add("format", default="auto", help="shape of the files: auto (by their keys), oasst-trees, helpsteer, ...")
    add("schema", default="", help="attributes to look at: a preset or a YAML file; default: those of the shape")
    add("type", default="TEXT_TO_VALUE", help="how records that have no type are rendered to be counted in tokens")
    add("mask_role", default="User", help="the speaker without loss, in records that do not say")
    add_tokenizer_flags(add)
    parser.set_defaults(library=None)
    add("seq_len", type=int, nargs="+", default=[1024, 2048, 4096], help="lengths to tell the truncation at")
    add_template_flags(add)
    add("compat", choices=("nemo1.23",), help="markers <extra_id_0/1/2>")
    add("html", help="write a page with charts here")
    add("json", help="write all figures here")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from steerlm_nemo.attributes import load_schema
    from steerlm_nemo.data.inspection import inspect_file
    from steerlm_nemo.data.preprocessing import Options
    from steerlm_nemo.data.rows import require_source
    from steerlm_nemo.outputs import require_writable
    from steerlm_nemo.records import atomic_output
    from steerlm_nemo.report.inspection import facts, html_report, text_report

    for name in args.files:
        require_source(name)
    for output in (args.html, args.json):
        if output is not None:
            require_writable(output)
    if min(args.seq_len) < 1:
        raise InputError(f"--seq_len is {min(args.seq_len)}; it must be 1 or more")
    schema = load_schema(args.schema) if args.schema else None
    options = Options(mask_role=args.mask_role, record_type=args.type, schema=schema)
    options.check()
    template = choose_template(args)
    tokenizer = None
    if args.model_file or args.model_name:
        tokenizer = load_tokenizer(args, template)
    with tempfile.TemporaryDirectory() as scratch:
        inspections = [
            inspect_file(name, options, template, tokenizer, args.format, Path(scratch)) for name in args.files
        ]
    seq_lens = sorted({*args.seq_len})
    print(text_report(inspections, seq_lens), end="")
    if tokenizer is None:
        print("\nTokens were not counted: give --model_file, or --model_name of a Hugging Face tokenizer.")
    outputs = {args.html: lambda: html_report(inspections, seq_lens)}
    outputs[args.json] = lambda: json.dumps(facts(inspections, seq_lens), ensure_ascii=False, indent=1) + "\n"
    for path, text in outputs.items():
        if path is not None:
            with atomic_output(path) as file:
                file.write(text())
            print(f"{path} written", file=sys.stderr)


if __name__ == "__main__":
    exit_with_message(main)
