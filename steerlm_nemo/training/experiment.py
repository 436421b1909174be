"""NeMo's experiment manager around a run: log folder, loggers, resumption. Imported after `compat.prepare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nemo.utils.exp_manager import exp_manager
from nemo_aligner.utils.train_script_utils import CustomLoggerWrapper, resolve_and_create_trainer
from omegaconf import DictConfig, open_dict

from steerlm_nemo.compat import Capabilities
from steerlm_nemo.config import printable
from steerlm_nemo.errors import ConfigError
from steerlm_nemo.training.method import Method
from steerlm_nemo.training.resume import check_resumable


def open_experiment(cfg: DictConfig, method: Method) -> tuple[Any, CustomLoggerWrapper]:
    """Lightning's trainer, which holds strategy, precision and checkpoints but does not loop, and the open loggers.

    Raises:
        CheckpointError: the checkpoint that NeMo chose to resume from is unsafe.
        ConfigError: no login at Weights & Biases.
    """
    precision = cfg.trainer.precision
    ptl_trainer = resolve_and_create_trainer(cfg, method.name)
    cfg.trainer.precision = precision  # NeMo's builder rewrites it
    settings = cfg.exp_manager.copy()
    with open_dict(settings):
        # The .nemo is written by `save`: NeMo writes it in place, next to whatever lies there (D-33).
        settings.checkpoint_callback_params.save_nemo_on_train_end = False
    exp_manager(ptl_trainer, settings)
    if ptl_trainer.ckpt_path is not None:
        check_resumable(Path(ptl_trainer.ckpt_path))
    _start(ptl_trainer.loggers)
    return ptl_trainer, CustomLoggerWrapper([*ptl_trainer.loggers])


def _start(loggers: list[Any]) -> None:
    """Open every logger now: a missing login is better learnt before the model is loaded than at the first step."""
    for logger in loggers:
        try:
            _ = logger.experiment
        except Exception as err:
            if not type(err).__module__.startswith("wandb"):
                raise
            raise ConfigError(
                f"exp_manager.create_wandb_logger: {err} Log in with `wandb login`, or set WANDB_MODE=offline"
            ) from err


def save_run_files(cfg: DictConfig, identity: dict[str, Any], capabilities: Capabilities) -> None:
    """What identifies the run, what it ran on, and its resolved config, into the log folder."""
    log_dir = Path(cfg.exp_manager.explicit_log_dir)
    checkpoints = log_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / "run.json").write_text(json.dumps(identity, indent=1))
    (log_dir / "capabilities.json").write_text(json.dumps(capabilities.as_dict(), indent=1))
    (log_dir / "config.yaml").write_text(printable(cfg))
