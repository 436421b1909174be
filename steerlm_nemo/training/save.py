"""The result of a run: one `.nemo` that says what it is, where it comes from and what it is called.

Imported after `compat.prepare`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from nemo.utils.callbacks.dist_ckpt_io import DistributedCheckpointIO
from omegaconf import DictConfig, OmegaConf, open_dict

from steerlm_nemo.checkpoint.archive import write_nemo
from steerlm_nemo.model_kind import PROVENANCE_KEY, SteerLMFormat
from steerlm_nemo.training.config import model_name
from steerlm_nemo.training.fingerprint import file_identity
from steerlm_nemo.training.method import Method


def saved_config(
    base: Mapping[str, Any], intended: DictConfig, model: Any, fmt: SteerLMFormat, cfg: DictConfig, method: Method
) -> DictConfig:
    """The `model_config.yaml` of the result: what the user asked for, not what was adapted to this machine."""
    config = intended.copy()
    with open_dict(config):
        config.target = f"{type(model).__module__}.{type(model).__qualname__}"
        config.nemo_version = base.get("nemo_version")
        config.tokenizer = base["tokenizer"]
        config[SteerLMFormat.CONFIG_KEY] = fmt.to_dict()
        config[PROVENANCE_KEY] = {
            "name": model_name(cfg, method),
            "base": str(cfg.model.restore_from_path),
            "train_file": file_identity(method.splits(cfg).train.file_path),
            "seed": cfg.model.seed,
        }
    return config


def save_nemo(model: Any, config: DictConfig, artifacts: dict[str, bytes], target: Path) -> None:
    """Write `target`, all ranks together; it appears under its name when complete.

    The weights go through NeMo's distributed checkpoint writer into a private folder. NeMo's own `save_to` writes
    `model_weights/` next to its target, where an older one may lie (D-33).
    """
    staging = target.parent / f".{target.name}.staging"
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed here
        staging.mkdir(parents=True)
    torch.distributed.barrier()
    writer = DistributedCheckpointIO.from_config(model.cfg, async_save=False)
    writer.save_checkpoint(model.sharded_state_dict(), str(staging / "model_weights"))
    torch.distributed.barrier()
    if is_first:
        for name, content in artifacts.items():
            (staging / name).write_bytes(content)
        OmegaConf.save(config, staging / "model_config.yaml")
        write_nemo(staging, target)
        shutil.rmtree(staging)
    torch.distributed.barrier()
