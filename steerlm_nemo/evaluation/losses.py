"""The loss curve of a training run, from its TensorBoard files."""

from __future__ import annotations

from pathlib import Path

from steerlm_nemo.errors import InputError

TAG = "train/loss"


def read_losses(log_dir: str | Path) -> list[tuple[int, float]]:
    """(step, loss) in order; where a resumed run repeated a step, its later value.

    Raises:
        InputError: the folder has no TensorBoard file with the training loss.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0: every point; the default keeps 10,000 drawn at random.
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    if TAG not in events.Tags()["scalars"]:
        raise InputError(f"{log_dir}: no TensorBoard file with {TAG!r}; is it the explicit_log_dir of a training?")
    newest = {event.step: event.value for event in sorted(events.Scalars(TAG), key=lambda event: event.wall_time)}
    return sorted(newest.items())
