r"""Show a record as training sees it: exact text, token ids, which tokens are targets, and where it is cut.

    python scripts/show_mask.py --dataset_file=data/oasst_train.jsonl --line 12 \
        --library=sentencepiece --model_file=tokenizer.model --seq_len=4096

On a terminal targets are green and what is cut is struck through; elsewhere [[targets]] and {{what is cut}}.
"""

import argparse
import os
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
    add("dataset_file", required=True, help="records, .jsonl, plain or compressed (.gz, .zst)")
    add("line", type=int, nargs="+", default=[1], help="numbers of the lines to show, from 1")
    add_tokenizer_flags(add)
    parser.set_defaults(library=None)
    add("seq_len", type=int, default=4096, help="tokens that training will see of a conversation")
    add_template_flags(add)
    add("compat", choices=("nemo1.23",), help="markers <extra_id_0/1/2>")
    add("html", help="write this page as well")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    from steerlm_nemo.data.mask_view import views_of_lines
    from steerlm_nemo.outputs import require_writable
    from steerlm_nemo.records import atomic_output, require_file
    from steerlm_nemo.report.mask import html_page, terminal_text

    require_file(args.dataset_file)
    if args.html:
        require_writable(args.html)
    for flag, values in (("seq_len", [args.seq_len]), ("line", args.line)):
        if min(values) < 1:
            raise InputError(f"--{flag} is {min(values)}; it must be 1 or more")
    template = choose_template(args)
    tokenizer = load_tokenizer(args, template)
    views = views_of_lines(args.dataset_file, args.line, template, tokenizer, args.seq_len)
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print("\n".join(terminal_text(view, colour) for view in views), end="")
    if args.html:
        with atomic_output(args.html) as file:
            file.write(html_page(views))
        print(f"{args.html} written", file=sys.stderr)


if __name__ == "__main__":
    exit_with_message(main)
