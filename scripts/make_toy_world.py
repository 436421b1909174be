"""Write the toy world of `make demo`: OpenAssistant-shaped trees whose attributes can be read off the text.

    python scripts/make_toy_world.py --output_dir results/demo/world --num_trees 700 --seed 1

Writes trees.jsonl.gz and held_out_prompts.jsonl (questions no tree asks, to steer on). Equal flags, equal bytes.
"""

import argparse
import gzip
from pathlib import Path

from steerlm_nemo.errors import InputError, exit_with_message
from steerlm_nemo.flags import Flags


def parse_args() -> argparse.Namespace:
    parser = Flags(__doc__)
    parser.flag("output_dir", type=Path, required=True)
    parser.flag("num_trees", type=int, default=700)
    parser.flag("seed", type=int, default=1)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from steerlm_nemo.records import atomic_output, dump_record, write_bytes
    from steerlm_nemo.toy.world import held_out_prompts, make_trees

    if args.num_trees < 1:
        raise InputError(f"--num_trees is {args.num_trees}; at least one tree is needed")
    if args.output_dir.exists() and not args.output_dir.is_dir():
        raise InputError(f"--output_dir {args.output_dir} is a file; give a folder")
    trees = "".join(dump_record(tree) + "\n" for tree in make_trees(args.num_trees, args.seed))
    write_bytes(args.output_dir / "trees.jsonl.gz", gzip.compress(trees.encode(), mtime=0))
    num_prompts = 0
    with atomic_output(args.output_dir / "held_out_prompts.jsonl") as file:
        for record in held_out_prompts(args.seed):
            file.write(dump_record(record) + "\n")
            num_prompts += 1
    print(f"{args.num_trees} toy trees and {num_prompts} held-out prompts written to {args.output_dir}")


if __name__ == "__main__":
    exit_with_message(main)
