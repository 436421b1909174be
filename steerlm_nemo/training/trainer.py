"""NeMo-Aligner's supervised trainer with tokens per second, a guard against NaN, and a stop that saves."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from nemo_aligner.algorithms.supervised import SupervisedTrainer
from nemo_aligner.data.nlp.builders import MegatronPretrainingRandomBatchSampler
from nemo_aligner.utils.distributed import Timer

from steerlm_nemo.errors import SteerLMError
from steerlm_nemo.training.batching import grouped_by_length


class RunTimer(Timer):
    """Aligner's time limit, which a signal can bring forward. Rank 0 decides for all."""

    stop_requested = False

    def request_stop(self, signum: int, frame: object) -> None:
        self.stop_requested = True

    def is_finished(self) -> bool:
        if self.stop_requested:
            self._duration = 0.0
        return super().is_finished()


class LengthGroupedSampler(MegatronPretrainingRandomBatchSampler):
    """Aligner's random batches, made of similar lengths. `lengths` are the samples', in tokens."""

    def __init__(self, lengths: Sequence[int], **options: Any) -> None:
        super().__init__(total_samples=len(lengths), **options)
        self.lengths = lengths

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.total_samples - self.last_batch_size
        self.epoch, done = divmod(self.consumed_samples, per_epoch)
        batches = grouped_by_length(self.lengths, self._global_batch_size, self.seed + self.epoch)
        for batch in batches[done // self._global_batch_size :]:
            self.consumed_samples += self._global_batch_size
            yield batch[self.data_parallel_rank :: self.data_parallel_size]


class SFTTrainer(SupervisedTrainer):
    """Adds `tokens_per_s` (unpadded tokens of all data-parallel ranks) to the metrics of every step."""

    def train_single_step(self, batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, Any]]:
        started = time.monotonic()
        loss, metrics = super().train_single_step(batch)
        require_finite(loss, self.step)
        num_tokens = batch["tokens"].ne(self.model.tokenizer.eos_id).sum().item() * self._num_replicas()
        metrics["tokens_per_s"] = round(num_tokens / (time.monotonic() - started))
        return loss, metrics

    @staticmethod
    def _num_replicas() -> int:
        from nemo_aligner.utils import parallel_state

        return parallel_state.get_data_parallel_world_size()


def require_finite(loss: float, step: int) -> None:
    """Raise SteerLMError at the first loss that is not a number: every later step would be one too."""
    if not math.isfinite(loss):
        raise SteerLMError(
            f"the loss is {loss} at step {step}. Lower model.optim.lr, or use trainer.precision=32; the last "
            "checkpoint is intact"
        )
