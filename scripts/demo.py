"""The whole SteerLM flow on this machine, two ranks, in one command; `make demo` runs it.

    python scripts/demo.py                              # nemo_configs/flows/toy.yaml: no download, measured exactly
    python scripts/demo.py --data trees.jsonl.gz        # nemo_configs/flows/oasst.yaml: genuine OpenAssistant trees

Stopped at any point, it goes on where it was when run again. Each stage is a script that can be run by hand; its
command and output are in OUTPUT_DIR/logs/. Ends with OUTPUT_DIR/summary.json and OUTPUT_DIR/report.html.
scripts/flow.py runs the same with any parameter of the flow.
"""

import argparse
import sys
from pathlib import Path

from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.flags import Flags

FLOWS = Path(__file__).resolve().parents[1] / "nemo_configs" / "flows"


def parse_args() -> argparse.Namespace:
    parser = Flags(__doc__)
    parser.flag("data", help="OpenAssistant trees, .jsonl or .jsonl.gz; without it, the toy world")
    parser.flag("output_dir", default="results/demo")
    parser.flag("num_trees", type=int, default=700, help="of the toy world")
    parser.flag("seed", type=int, default=1)
    parser.flag("fresh", action="store_true", help="forget what an earlier run has done")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from steerlm_nemo.pipeline.flow import load_flow
    from steerlm_nemo.pipeline.launcher import ThisMachine
    from steerlm_nemo.pipeline.processes import stop_like_ctrl_c
    from steerlm_nemo.pipeline.runner import run
    from steerlm_nemo.records import require_file

    if args.data is not None:
        require_file(args.data)
    name, world = ("toy", f"num_trees={args.num_trees}") if args.data is None else ("oasst", f"trees={args.data}")
    flow = load_flow(FLOWS / f"{name}.yaml", [f"out={args.output_dir}", f"seed={args.seed}", world])
    stop_like_ctrl_c()
    sys.exit(run(flow, flow.stages, ThisMachine(), fresh=args.fresh))


if __name__ == "__main__":
    exit_with_message(main)
