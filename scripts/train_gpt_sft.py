#!/usr/bin/env python
"""Train a value model or a SteerLM model (SteerLM steps 1, 3 and 4).

  python scripts/train_gpt_sft.py [--config-name=NAME] [--config-path=DIR] KEY=VALUE ...

Key names are NeMo-Aligner's; nemo_configs/gpt_sft.yaml lists them all. Needed at least:
  model.restore_from_path=base.nemo
  model.data.train_ds.file_path=train.jsonl model.data.validation_ds.file_path=val.jsonl
  exp_manager.explicit_log_dir=results/run

trainer.devices=2 model.tensor_model_parallel_size=2 starts its two ranks by itself; torchrun and srun work too.
Run the same command again to resume. The result is <explicit_log_dir>/checkpoints/megatron_gpt_sft.nemo.
  --help   this text        --cfg   print the resolved config and stop
Exit codes: 0 done, 2 cannot run, 75 stopped by a signal or time limit after saving.
"""

from __future__ import annotations

import sys

from steerlm_nemo.errors import exit_with_message


def main() -> None:
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return

    from steerlm_nemo import ranks
    from steerlm_nemo.config import load_config, printable
    from steerlm_nemo.training import config
    from steerlm_nemo.training.fingerprint import refuse_foreign_resume

    show_only = "--cfg" in argv
    cfg = load_config([arg for arg in argv if arg != "--cfg"], default_name="gpt_sft")
    config.require_values(cfg)
    if show_only:
        print(printable(cfg))
        return
    from steerlm_nemo.checkpoint.archive import check_nemo

    base = check_nemo(cfg.model.restore_from_path)
    config.check(cfg, base)
    refuse_foreign_resume(cfg)
    if ranks.should_warn():
        for warning in config.warnings(cfg, base):
            print(f"WARNING: {warning}", file=sys.stderr)
    if not ranks.ranks_exist() and cfg.trainer.num_nodes == 1 and cfg.trainer.devices > 1:
        sys.exit(ranks.launch_ranks(sys.argv, cfg.trainer.devices))

    from steerlm_nemo.training import sft

    sft.run(cfg)


if __name__ == "__main__":
    exit_with_message(main)
