#!/usr/bin/env python
"""Train a value model or a SteerLM model (SteerLM steps 1, 3 and 4).

  python scripts/train_gpt_sft.py [--config-name=NAME] [--config-path=DIR] KEY=VALUE ...

Key names are NeMo-Aligner's; nemo_configs/gpt_sft.yaml lists them all. Needed at least:
  model.restore_from_path=base.nemo
  model.data.train_ds.file_path=train.jsonl model.data.validation_ds.file_path=val.jsonl
  exp_manager.explicit_log_dir=results/run

trainer.devices=2 model.tensor_model_parallel_size=2 starts its two ranks by itself; torchrun and srun work too.
Run the same command again to resume. The result is <explicit_log_dir>/checkpoints/megatron_gpt_sft.nemo;
a server calls the model after the log folder, or name= where that is given.
  --help   this text        --cfg   print the resolved config and stop
Exit codes: 0 done, 2 cannot run, 75 stopped by a signal or time limit after saving.
"""

from __future__ import annotations

import sys

from steerlm_nemo.errors import exit_with_message


def main() -> None:
    if "--help" in sys.argv or "-h" in sys.argv:
        print(__doc__)
        return

    from steerlm_nemo.training.command import train
    from steerlm_nemo.training.methods import METHODS

    train(sys.argv, METHODS["sft"])


if __name__ == "__main__":
    exit_with_message(main)
