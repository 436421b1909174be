"""Run a flow: stages of commands, what is up to date left out; killed anywhere, it goes on.

    python scripts/flow.py run nemo_configs/flows/toy.yaml
    python scripts/flow.py run nemo_configs/flows/oasst.yaml trees=trees.jsonl.gz out=results/oasst --dry-run
    python scripts/flow.py run nemo_configs/flows/toy.yaml --from=train-steerlm

KEY=VALUE sets a parameter of the flow. OUT/manifest.json records what each stage read, ran and wrote, OUT/logs/ what it
said. The keys of a flow are explained in docs/flows.md.
"""

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.flags import Flags

if TYPE_CHECKING:
    from steerlm_nemo.pipeline.launcher import Launcher


def parse_args() -> argparse.Namespace:
    parser = Flags(__doc__)
    parser.add_argument("verb", choices=["run"], help="run the flow")
    parser.add_argument("flow", help="its file, for example nemo_configs/flows/toy.yaml")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="parameters of the flow")
    parser.flag("dry_run", action="store_true", help="print the stages and their commands, ready to be pasted")
    parser.flag("only", metavar="STAGE", help="this stage alone")
    parser.flag("from", metavar="STAGE", dest="start", help="this stage and those after it")
    parser.flag("fresh", action="store_true", help="forget what an earlier run has done of these stages")
    parser.flag("srun", metavar="OPTIONS", help="in a Slurm job: every command is a step, with these options of srun")
    args = parser.parse_intermixed_args()
    if args.only is not None and args.start is not None:
        parser.error("give either --only or --from")
    return args


def main() -> None:
    args = parse_args()
    from steerlm_nemo.pipeline.flow import load_flow
    from steerlm_nemo.pipeline.launcher import SlurmJob, ThisMachine
    from steerlm_nemo.pipeline.processes import stop_like_ctrl_c
    from steerlm_nemo.pipeline.runner import run
    from steerlm_nemo.pipeline.shell import shell_script

    flow = load_flow(args.flow, args.settings)
    stages = flow.choose(args.only, args.start)
    launcher: Launcher = ThisMachine() if args.srun is None else SlurmJob(shlex.split(args.srun))
    if args.dry_run:
        print(shell_script(stages, launcher))
        return
    stop_like_ctrl_c()
    sys.exit(run(flow, stages, launcher, fresh=args.fresh))


if __name__ == "__main__":
    exit_with_message(main)
