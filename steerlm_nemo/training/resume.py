"""Stopping a run so that the same command goes on with it, and what is looked at before it does."""

from __future__ import annotations

from pathlib import Path

from steerlm_nemo.checkpoint.safety import check_directory
from steerlm_nemo.errors import CheckpointError, SteerLMError

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
