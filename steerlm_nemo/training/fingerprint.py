"""What identifies a run, so that a run is only ever resumed as itself, and a finished one left alone."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from steerlm_nemo.attributes import digest_of
from steerlm_nemo.errors import ConfigError, shown
from steerlm_nemo.records import atomic_output, read_json
from steerlm_nemo.training.method import Method


def fingerprint(cfg: DictConfig, method: Method) -> dict[str, Any]:
    """What must not change between a run and its resumption.

    The optimizer settings and the number of steps are part of it: a resumed run goes on along the schedule it began
    with.
    """
    train, settings = method.splits(cfg).train, method.settings(cfg)
    return {
        "train_file": file_identity(train.file_path),
        "restore_from_path": str(Path(cfg.model.restore_from_path).resolve()),
        "method": method.name,
        **method.identity(cfg),
        "global_batch_size": train.global_batch_size,
        "group_by_length": train.group_by_length,
        "max_steps": settings.max_steps,
        "max_epochs": settings.max_epochs,
        "optim": OmegaConf.to_container(cfg.model.optim, resolve=True),
        "seed": cfg.model.seed,
    }


def file_identity(path: str) -> dict[str, Any]:
    """Path, size and a digest of the first mebibyte."""
    with open(path, "rb") as file:
        head = file.read(1 << 20)
    return {"path": str(Path(path).resolve()), "bytes": os.path.getsize(path), "head": digest_of({"h": head.hex()})}


def note_result(log_dir: Path, steps: int, nemo: Path) -> None:
    """Remember that the run of this folder is finished, and what came out."""
    with atomic_output(_result_file(log_dir)) as file:
        json.dump({"steps": steps, "nemo": file_identity(str(nemo))}, file)


def finished_line(cfg: DictConfig) -> str | None:
    """A sentence about the run of the log folder if it is finished and its `.nemo` lies there as it was written."""
    result_file = _result_file(Path(cfg.exp_manager.explicit_log_dir))
    if not cfg.exp_manager.resume_if_exists or not result_file.is_file():
        return None
    result = json.loads(result_file.read_text())
    nemo = Path(result["nemo"]["path"])
    if not nemo.is_file() or file_identity(str(nemo)) != result["nemo"]:
        return None
    return f"this run is finished: {result['steps']} steps, {nemo}; nothing was done"


def _result_file(log_dir: Path) -> Path:
    return log_dir / "checkpoints" / "result.json"


def refuse_foreign_resume(cfg: DictConfig, method: Method) -> None:
    """Resuming somebody else's run would end at once, or go on with other data (D-04).

    Raises:
        ConfigError: the log folder holds a run that differs; both sides are shown.
    """
    log_dir = Path(cfg.exp_manager.explicit_log_dir)
    run_file = log_dir / "checkpoints" / "run.json"
    if not run_file.is_file() or not cfg.exp_manager.resume_if_exists:
        return
    before, now = read_json(run_file), json.loads(json.dumps(fingerprint(cfg, method)))
    if not isinstance(before, dict):
        raise ConfigError(f"{run_file}: not what identifies a run. Give this run its own exp_manager.explicit_log_dir.")
    differing = [key for key in now if before.get(key) != now[key]]
    if differing:
        sides = "\n".join(
            f"  {key}: that run {shown(before.get(key))}, this one {shown(now[key])}" for key in differing
        )
        raise ConfigError(
            f"{log_dir} holds another run, which cannot be resumed with this config:\n{sides}\n"
            "Give this run its own exp_manager.explicit_log_dir, or delete that folder."
        )
