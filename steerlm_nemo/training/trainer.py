"""NeMo-Aligner's supervised trainer with tokens per second, a guard against NaN, and a stop that saves.

Imported after `compat.prepare`.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.utils import parallel_state
from nemo_aligner.utils.distributed import Timer

from steerlm_nemo.errors import SteerLMError


class RunTimer(Timer):
    """Aligner's time limit, which a signal can bring forward. Rank 0 decides for all."""

    stop_requested = False

    def request_stop(self, signum: int, frame: object) -> None:
        self.stop_requested = True

    def is_finished(self) -> bool:
        if self.stop_requested:
            self._duration = 0.0
        return super().is_finished()


class GuardedTrainer(SupervisedTrainer):
    """Adds `tokens_per_s` (unpadded tokens of all data-parallel ranks) to the metrics of every step."""

    def train_single_step(self, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, Any]]:
        started = time.monotonic()
        loss, metrics = super().train_single_step(batch)
        require_finite(loss, self.step)
        num_tokens = batch["tokens"].ne(self.model.tokenizer.eos_id).sum().item()
        num_tokens *= parallel_state.get_data_parallel_world_size()
        metrics["tokens_per_s"] = round(num_tokens / (time.monotonic() - started))
        return loss, metrics


def require_finite(loss: float, step: int) -> None:
    """Raise SteerLMError at the first loss that is not a number: every later step would be one too."""
    if not math.isfinite(loss):
        raise SteerLMError(
            f"the loss is {loss} at step {step}. Lower model.optim.lr, or use trainer.precision=32; the last "
            "checkpoint is intact"
        )
