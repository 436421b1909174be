#!/usr/bin/env python
"""Convert a Hugging Face Llama folder to a .nemo file that loads at any tensor-parallel size.

Mistral, Qwen2, Qwen3 and Phi-3 convert, too; docs/checkpoints.md has the table.

scripts/convert_hf_llama_to_nemo.py --in-file models/llama-2-7b-hf --out-file models/llama-2-7b.nemo

Where the model fits in memory, NeMo's logits are compared with transformers' before the file gets its name; if they
differ nothing is put in place and the exit code is 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.flags import Flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Flags(__doc__)
    parser.flag(
        *("in_file", "input_name_or_path"),
        dest="hf_dir",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="Hugging Face checkpoint: config.json, weights (safetensors or .bin), tokenizer.model or tokenizer.json",
    )  # fmt: skip
    parser.flag(
        *("out_file", "output_path"),
        dest="out",
        type=Path,
        required=True,
        metavar="FILE.nemo",
    )  # fmt: skip
    parser.flag("precision", choices=["32", "16", "bf16"], help="default: the dtype of the source")
    parser.flag(
        "no_check",
        action="store_true",
        help="do not compare NeMo's logits with transformers' before the file is put in place",
    )
    parser.flag("llama31", nargs="?", const="True", help="ignored: rope scaling is read from config.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from steerlm_nemo.checkpoint.from_hf import convert, plan_conversion
    from steerlm_nemo.models.logits_check import logits_check

    if args.llama31 is not None:
        print("WARNING: --llama31 is ignored; rope scaling is what config.json says", file=sys.stderr)
    conversion = plan_conversion(args.hf_dir, args.precision)
    check = None if args.no_check else logits_check(conversion, args.hf_dir, report)
    convert(conversion, args.out, report, check)


def report(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    exit_with_message(main, tidy=True)
