"""One rank of stock NeMo: `restore_from` on the archive itself and `save_to`, with none of this project's loading code.

    stock_worker.py TASKS.json

TASKS holds a list of {nemo, token_ids: a safetensors file, logits: where to store them, save: {format: path}}.
Only `compat` is used, without which NeMo does not run on a CPU at all.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from steerlm_nemo.compat import prepare, quiet_logs


def main() -> None:
    capabilities = prepare()
    quiet_logs(verbose=False)
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector
    from omegaconf import OmegaConf, open_dict
    from safetensors.torch import load_file, save_file

    from steerlm_nemo.compat.model_config import for_this_machine
    from steerlm_nemo.models.logits_check import nemo_logits

    tp_size = int(os.environ["WORLD_SIZE"])
    settings = {"devices": tp_size, "num_nodes": 1, "accelerator": "cpu", "precision": "32", "logger": False}
    settings |= {"enable_checkpointing": False, "use_distributed_sampler": False}
    for task in json.loads(Path(sys.argv[1]).read_text()):
        connector = NLPSaveRestoreConnector()
        trainer = MegatronTrainerBuilder(
            OmegaConf.create(
                {"trainer": settings, "exp_manager": None, "model": {"precision": 32, "gradient_as_bucket_view": False}}
            )
        ).create_trainer(callbacks=[])
        config = MegatronGPTModel.restore_from(
            task["nemo"], trainer=trainer, return_config=True, save_restore_connector=connector
        )
        config = for_this_machine(config, capabilities)
        with open_dict(config):
            config.tensor_model_parallel_size = tp_size
        model = MegatronGPTModel.restore_from(
            task["nemo"], trainer=trainer, override_config_path=config, save_restore_connector=connector
        )
        model.freeze()
        logits = {name: nemo_logits(model, ids) for name, ids in load_file(task["token_ids"]).items()}
        if os.environ["RANK"] == "0":
            save_file(logits, task["logits"])
        for weights_format, path in task["save"].items():
            with open_dict(model.cfg):
                model.cfg.dist_ckpt_format = weights_format
            model.save_to(path)


if __name__ == "__main__":
    main()
