"""Batches for the trainer: Aligner's random order, or one of similar lengths. Imported after `compat.prepare`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from nemo_aligner.data.nlp.builders import MegatronPretrainingRandomBatchSampler, build_dataloader
from nemo_aligner.utils.trainer_utils import compute_limit_batches
from omegaconf import DictConfig

from steerlm_nemo.errors import ConfigError
from steerlm_nemo.training.batching import grouped_by_length, padding_share
from steerlm_nemo.training.method import Data, Dataset, Method, Split


class Loaders(NamedTuple):
    train: torch.utils.data.DataLoader
    validation: torch.utils.data.DataLoader


def build_loaders(
    cfg: DictConfig, method: Method, data: Data, consumed_samples: int, report: Callable[[str], object]
) -> Loaders:
    """Loaders of this rank's share of every batch, the training one from after `consumed_samples`.

    Raises:
        ConfigError: a file has fewer items than a global batch (D-24).
    """
    splits = method.splits(cfg)
    _require_a_batch(data.train, splits.train, "lower it")
    if method.settings(cfg).limit_val_batches != 0:
        hint = f"lower it or set {method.key('limit_val_batches')}=0"
        _require_a_batch(data.validation, splits.validation, hint)
    report(_padding_line(data.train, splits.train, cfg.model.seed))
    train = _loader(cfg, data.train, splits.train, consumed_samples, use_random_sampler=True)
    validation = _loader(cfg, data.validation, splits.validation, 0, use_random_sampler=False)
    return Loaders(_grouped(train, data.train) if splits.train.group_by_length else train, validation)


def num_steps(cfg: DictConfig, method: Method, data: Data) -> int:
    """Optimizer steps this run will take: what the data gives, or max_steps if that is less."""
    settings, batch_size = method.settings(cfg), method.splits(cfg).train.global_batch_size
    per_epoch = compute_limit_batches(len(data.train) // batch_size, settings.limit_train_batches)
    from_data = per_epoch * settings.max_epochs
    return from_data if settings.max_steps < 0 else min(from_data, settings.max_steps)


def _require_a_batch(dataset: Dataset, split: Split, hint: str) -> None:
    if len(dataset) < split.global_batch_size:
        raise ConfigError(
            f"{split.file_path} has {len(dataset)} usable records, fewer than {split.key}.global_batch_size "
            f"{split.global_batch_size}; {hint}"
        )


def _padding_line(dataset: Dataset, split: Split, seed: int) -> str:
    """How much of the batches of the first epoch is padding, with and without grouping."""
    lengths, size = dataset.lengths, split.global_batch_size
    as_they_come = [list(range(start, start + size)) for start in range(0, len(lengths) - size + 1, size)]
    shares = {
        False: padding_share(as_they_come, lengths, dataset.pad_to_multiple),
        True: padding_share(grouped_by_length(lengths, size, seed), lengths, dataset.pad_to_multiple),
    }
    other = "without" if split.group_by_length else "with"
    return (
        f"padding: {shares[split.group_by_length]:.0%} of the training batches, {shares[not split.group_by_length]:.0%}"
        f" {other} {split.key}.group_by_length"
    )


def _loader(
    cfg: DictConfig, dataset: Dataset, split: Split, consumed_samples: int, use_random_sampler: bool
) -> torch.utils.data.DataLoader:
    return build_dataloader(
        cfg=cfg,
        dataset=dataset,
        consumed_samples=consumed_samples,
        mbs=split.micro_batch_size,
        gbs=split.global_batch_size,
        collate_fn=dataset.collate_fn,
        drop_last=True,
        load_gbs=True,
        use_random_sampler=use_random_sampler,
    )


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


def _grouped(loader: torch.utils.data.DataLoader, dataset: Dataset) -> torch.utils.data.DataLoader:
    """The same loader with batches of similar length."""
    plain: Any = loader.batch_sampler
    sampler = LengthGroupedSampler(
        dataset.lengths,
        consumed_samples=plain.consumed_samples,
        micro_batch_size=plain.micro_batch_size,
        global_batch_size=plain.global_batch_size,
        data_parallel_rank=plain.data_parallel_rank,
        data_parallel_size=plain.data_parallel_size,
        drop_last=True,
        seed=plain.seed,
    )
    return torch.utils.data.DataLoader(
        loader.dataset,
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        collate_fn=loader.collate_fn,
    )
