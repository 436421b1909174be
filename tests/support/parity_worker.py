"""One tensor-parallel rank: loads `.nemo` files with NeMo's MegatronGPTModel and stores their logits.

    parity_worker.py TASKS.json

TASKS holds a list of {nemo, token_ids: a safetensors file, logits: where to store them, save: folder or null}.
With `save`, NeMo's own checkpoint writer stores the loaded weights there.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from steerlm_nemo.models.loading import load_for_inference
from steerlm_nemo.models.logits_check import nemo_logits


def main() -> None:
    from safetensors.torch import load_file, save_file

    tp_size = int(os.environ["WORLD_SIZE"])
    for task in json.loads(Path(sys.argv[1]).read_text()):
        model = load_for_inference(task["nemo"], tp_size, "32").nemo_model
        logits = {name: nemo_logits(model, token_ids) for name, token_ids in load_file(task["token_ids"]).items()}
        if os.environ["RANK"] == "0":
            save_file(logits, task["logits"])
        if task["save"]:
            from nemo.utils.callbacks.dist_ckpt_io import DistributedCheckpointIO

            writer = DistributedCheckpointIO.from_config(model.cfg, async_save=False)
            writer.save_checkpoint(model.sharded_state_dict(), task["save"])


if __name__ == "__main__":
    main()
