#!/usr/bin/env python
"""Export a .nemo Llama (converted or trained) to a Hugging Face folder: safetensors, config and tokenizer.

scripts/convert_nemo_to_hf_llama.py --in-file results/steerlm.nemo --out-file models/steerlm-hf
"""

from __future__ import annotations

import argparse
from pathlib import Path

from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.flags import Flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Flags(__doc__)
    parser.flag(
        *("in_file", "input_name_or_path"),
        dest="nemo",
        type=Path,
        required=True,
        metavar="FILE.nemo",
    )  # fmt: skip
    parser.flag(
        *("out_file", "output_path"),
        dest="out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a folder that does not exist yet, or is empty",
    )  # fmt: skip
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from steerlm_nemo.checkpoint.archive import open_nemo
    from steerlm_nemo.checkpoint.to_hf import export, plan_export
    from steerlm_nemo.model_kind import SteerLMFormat

    with open_nemo(args.nemo) as nemo:
        plan = plan_export(nemo)
        if (fmt := SteerLMFormat.of_config(nemo.config)) is not None:
            report(f"this is {fmt.kind.title}; its markers and attribute schema {fmt.schema.name} stay in the .nemo")
        export(plan, args.out, report)


def report(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    exit_with_message(main, tidy=True)
