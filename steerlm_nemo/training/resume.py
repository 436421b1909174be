"""Stopping a run so that the same command goes on with it, and what is looked at before it does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from omegaconf import DictConfig

from steerlm_nemo.checkpoint.safety import check_directory
from steerlm_nemo.errors import CheckpointError, SteerLMError

_UNFINISHED = "-unfinished"  # of the empty file that NeMo puts beside a checkpoint while it writes it
_DISCARDED = ".discarded"  # at the end: NeMo takes what ends with "last" for a checkpoint, hidden or not
EXIT_STOPPED_EARLY = 75  # EX_TEMPFAIL: the same command goes on where this one stopped; Slurm scripts requeue on it


class StoppedEarlyError(SteerLMError):
    """The run saved and stopped because of a signal or its time limit."""

    exit_code = EXIT_STOPPED_EARLY


def check_log_folder(log_dir: Path) -> None:
    """Refuse a log folder with a checkpoint in it that is unsafe to resume from. Raises CheckpointError."""
    for checkpoint in (*log_dir.glob("checkpoints/*last"), *log_dir.glob("checkpoints/*end")):
        check_resumable(checkpoint)


def check_resumable(checkpoint: Path) -> None:
    """Refuse a training checkpoint that is unsafe: NeMo unpickles what it resumes from.

    Raises:
        CheckpointError: it is not a distributed checkpoint, or something in it is refused.
    """
    if not checkpoint.is_dir():
        raise CheckpointError(
            f"{checkpoint}: not a folder. Runs resume from distributed checkpoints, which are folders; move this away."
        )
    check_directory(checkpoint)


def clear_leftovers(cfg: DictConfig) -> None:
    """Remove what a kill during a save left: checkpoints without an end, and an old last one beside the new.

    NeMo ends with a traceback at either, at every start, until somebody deletes it by hand. Every rank may call this,
    before NeMo looks: a rename decides which of them removes a folder, and says so; for none it is there any more.
    """
    if not cfg.exp_manager.resume_if_exists:
        return
    checkpoints = Path(cfg.exp_manager.explicit_log_dir) / "checkpoints"
    for marker in sorted(checkpoints.glob(f"*{_UNFINISHED}")):
        checkpoint = marker.with_name(marker.name.removesuffix(_UNFINISHED))
        if _discard(checkpoint):
            print(f"removed {checkpoint}: the run was killed while it was being written", flush=True)
        marker.unlink(missing_ok=True)  # after the folder, which without it would pass for a whole checkpoint
    finished = sorted(checkpoints.glob("*-last"), key=_steps)
    for checkpoint in finished[:-1]:
        if _discard(checkpoint):
            print(f"removed {checkpoint}: {finished[-1].name} was complete when the run was killed", flush=True)
    for discarded in checkpoints.glob(f"*{_DISCARDED}"):
        shutil.rmtree(discarded, ignore_errors=True)


def _discard(checkpoint: Path) -> bool:
    try:
        checkpoint.rename(checkpoint.with_name(f"{checkpoint.name}{_DISCARDED}"))
    except FileNotFoundError:
        return False  # no more was written than the marker, or another rank was faster
    return True


def _steps(checkpoint: Path) -> int:
    """Optimizer steps behind a checkpoint, which stand in its name."""
    found = re.search(r"step=(\d+)", checkpoint.name)
    return int(found[1]) if found else -1
