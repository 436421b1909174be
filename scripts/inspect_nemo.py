#!/usr/bin/env python
"""Say what a .nemo file holds and whether it is whole and safe to load.

    scripts/inspect_nemo.py models/llama-2-7b.nemo [--json] [--verify]

The exit code is 2 when something is damaged or unsafe.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from steerlm_nemo.errors import EXIT_BAD_INPUT, InputError, exit_with_message
from steerlm_nemo.flags import Flags


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Flags(__doc__)
    parser.add_argument("nemo", type=Path, metavar="FILE.nemo", help="a .nemo file or an extracted folder")
    parser.flag("json", action="store_true", help="print JSON")
    parser.flag(
        "verify",
        action="store_true",
        help="read every tensor, compare it with the CRC-32 stored when it was written, count NaN, hash every member; "
        "finds what is unreadable and what changed by accident, not a forgery. zarr weights have no CRC",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    from steerlm_nemo.checkpoint.inspect import inspect_nemo, render
    from steerlm_nemo.records import unreadable

    try:
        if not args.nemo.exists():
            raise InputError(f"{args.nemo}: no such file or folder; give a .nemo file or an extracted one")
    except OSError as err:
        raise unreadable(args.nemo, err) from err
    facts = inspect_nemo(args.nemo, args.verify)
    print(json.dumps(facts, indent=2, default=str) if args.json else render(facts))
    if facts["damage"]:
        sys.exit(EXIT_BAD_INPUT)


if __name__ == "__main__":
    exit_with_message(main)
