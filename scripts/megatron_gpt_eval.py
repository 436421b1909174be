#!/usr/bin/env python
"""Serve a value model or a SteerLM model over HTTP: PUT /generate, OpenAI's endpoints, POST /v1/annotate, /metrics.

  python scripts/megatron_gpt_eval.py gpt_model_file=model.nemo server=True port=1424 [KEY=VALUE ...]

Keys are NeMo's; nemo_configs/megatron_gpt_inference.yaml lists them. trainer.devices=2 tensor_model_parallel_size=2
starts its two ranks by itself; torchrun and srun work too. Binds 127.0.0.1 unless host= says otherwise; with the
environment variable STEERLM_TOKEN, clients need that bearer token. docs/serving.md has all endpoints.
  --served_model_name NAME   what clients call the model; the same as served_model_name=NAME
  server=False prompts='["Once upon a time"]'   continue prompts, print, stop
  --help   this text        --cfg   print the resolved config and stop
"""

from __future__ import annotations

import sys

from steerlm_nemo.errors import ConfigError, exit_with_message


def main() -> None:
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return

    from omegaconf import OmegaConf

    from steerlm_nemo import ranks
    from steerlm_nemo.config import load_config, printable
    from steerlm_nemo.serving import process

    overrides = process.overrides_from([arg for arg in argv if arg != "--cfg"])
    cfg = load_config(overrides, default_name="megatron_gpt_inference")
    if OmegaConf.is_missing(cfg, "gpt_model_file"):
        raise ConfigError("gpt_model_file is not set; give the .nemo to serve: gpt_model_file=model.nemo")
    process.resolve(cfg)
    if "--cfg" in argv:
        print(printable(cfg))
        return
    if not ranks.ranks_exist() and cfg.trainer.devices > 1 and cfg.trainer.num_nodes == 1:
        if cfg.server:
            from steerlm_nemo.engine.watch import patience_from
            from steerlm_nemo.serving.front_door import settings_from
            from steerlm_nemo.serving.listener import open_listener

            settings_from(cfg.http)
            patience_from(cfg.engine)
            # A taken port is better learnt before the ranks start; rank 0 will warn if there is reason to.
            open_listener(cfg.port, cfg.host, has_token=True).close()
        sys.exit(ranks.launch_ranks(sys.argv, cfg.trainer.devices))
    process.run(cfg)


if __name__ == "__main__":
    exit_with_message(main)
