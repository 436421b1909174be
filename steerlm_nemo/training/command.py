"""What a training script does with its command line: check it, then start the ranks, or be one of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from steerlm_nemo import ranks
from steerlm_nemo.checkpoint.archive import check_nemo
from steerlm_nemo.config import load_config, printable
from steerlm_nemo.training.config import check, require_values
from steerlm_nemo.training.fingerprint import finished_line, refuse_foreign_resume
from steerlm_nemo.training.method import Method
from steerlm_nemo.training.resume import clear_leftovers


def train(argv: Sequence[str], method: Method) -> None:
    """Run the script `argv[0]` with the settings after it; `--cfg` prints the config and stops.

    Raises:
        SteerLMError: the training cannot start, or ended early.
        SystemExit: it ran in ranks of its own; theirs is the exit code.
    """
    cfg = load_config([arg for arg in argv[1:] if arg != "--cfg"], method.default_config)
    require_values(cfg)
    if "--cfg" in argv:
        print(printable(cfg))
        return
    base = check_nemo(cfg.model.restore_from_path)
    check(cfg, base, method)
    refuse_foreign_resume(cfg, method)
    if line := finished_line(cfg):
        if ranks.this_rank() == 0:
            print(line)
        return
    if ranks.should_warn():
        clear_leftovers(cfg)  # before ranks are there that could be faster, and silent
        for warning in method.warnings(cfg, base):
            print(f"WARNING: {warning}", file=sys.stderr)
    if not ranks.ranks_exist() and cfg.trainer.num_nodes == 1 and cfg.trainer.devices > 1:
        sys.exit(ranks.launch_ranks(argv, cfg.trainer.devices))

    from steerlm_nemo.training.run import run

    run(cfg, method)
