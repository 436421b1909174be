"""What a training method is: a row of `training.methods.METHODS`, and what its columns speak of.

Rows are read before NeMo is imported: what needs NeMo or torch stands behind a call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from omegaconf import DictConfig

from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.template import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


class Split(NamedTuple):
    """One file of records and how it is batched. `key` is the section of the config that says so."""

    key: str
    file_path: str
    micro_batch_size: int  # items per forward pass and rank
    global_batch_size: int  # items per optimizer step
    group_by_length: bool


class Splits(NamedTuple):
    train: Split
    validation: Split


class Dataset(Protocol):
    """What the trainer draws from: prepared items, and how they become a batch."""

    pad_to_multiple: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    @property
    def lengths(self) -> list[int]:
        """Tokens of each item in a batch, padding aside."""
        ...

    def collate_fn(self, batch: Sequence[Any]) -> dict[str, Tensor]: ...


class Data(NamedTuple):
    """What a model learns from, and the format, kind included, of the model that comes out."""

    train: Dataset
    validation: Dataset
    format: SteerLMFormat


@dataclass(frozen=True)
class Method:
    """A way to train: all that differs between one method and another.

    `name` is also the section of the config with the settings of its loop, `trainer.<name>`. A model is saved with all
    weights it has, as what `load_model` made it; what it is for is the kind in `Data.format`.
    """

    name: str
    default_config: str  # of nemo_configs/, with every key there is
    splits: Callable[[DictConfig], Splits]
    problems: Callable[[DictConfig], Iterator[str]]  # of a config, beyond those of every training
    # Of settings that run but are probably not meant, for the model config of the checkpoint to start from.
    warnings: Callable[[DictConfig, Mapping[str, Any]], Iterator[str]]
    identity: Callable[[DictConfig], dict[str, Any]]  # how records are read: a run resumes with the same only
    load_data: Callable[[DictConfig, Tokenizer, Callable[[str], object]], Data]  # the last hears what became of records
    # The base in a folder, for Lightning's trainer, as a model of NeMo's or Aligner's that can be trained so.
    load_model: Callable[[DictConfig, Any, Path], Any]
    trainer_class: Callable[[], type[Any]]  # called with the arguments of Aligner's SupervisedTrainer

    def settings(self, cfg: DictConfig) -> DictConfig:
        """The settings of the loop: steps, intervals, limits, clipping."""
        return cfg.trainer[self.name]

    def key(self, setting: str) -> str:
        """The full key of a setting of the loop, for messages."""
        return f"trainer.{self.name}.{setting}"
