"""Checking a training configuration before NeMo is imported and before any rank is started.

Every problem found is reported together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steerlm_nemo.attributes import AttributeSchema, schema_named
from steerlm_nemo.conversation import RECORD_TYPES
from steerlm_nemo.errors import ConfigError, SteerLMError
from steerlm_nemo.template import ChatTemplate


def read_template(cfg: DictConfig, warn: Callable[[str], object] = lambda message: None) -> ChatTemplate:
    """The chat template of `model.data.chat_prompt_tokens`; `warn` hears of markers that a shell damaged."""
    return ChatTemplate.from_config(OmegaConf.to_container(cfg.model.data.chat_prompt_tokens), warn)  # type: ignore[arg-type]


def read_schema(cfg: DictConfig) -> AttributeSchema:
    """The attribute schema of `model.data.attribute_schema`."""
    return schema_named(str(cfg.model.data.attribute_schema))


def data_parallel_size(cfg: DictConfig) -> int:
    """Number of model replicas; exact only for a config that passed `check`."""
    model = cfg.model
    model_ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    return cfg.trainer.num_nodes * cfg.trainer.devices // model_ranks


def check(cfg: DictConfig, base: DictConfig | dict[str, Any]) -> None:
    """Refuse a training configuration that cannot run. `base` is the model config of the checkpoint to start from.

    Fills in `model.encoder_seq_length` from it where the run leaves it open.

    Raises:
        ConfigError: lists every problem found.
    """
    if cfg.model.encoder_seq_length is None:
        cfg.model.encoder_seq_length = base["encoder_seq_length"]
    problems = list(_problems(cfg, base))
    if problems:
        raise ConfigError("this training cannot start:\n" + "\n".join(f"  - {problem}" for problem in problems))


def require_values(cfg: DictConfig) -> None:
    """Raise ConfigError naming every key that must be given and is not, or whose interpolation fails."""
    problems = []
    for key in ("model.restore_from_path", "model.data.train_ds.file_path", "model.data.validation_ds.file_path"):
        if OmegaConf.is_missing(OmegaConf.select(cfg, key.rsplit(".", 1)[0]), key.rsplit(".", 1)[1]):
            problems.append(f"{key} is not set")
    if cfg.exp_manager.explicit_log_dir is None:
        problems.append("exp_manager.explicit_log_dir is not set; give every run a folder of its own")
    for key in ("trainer.devices", "trainer.num_nodes", "model.tensor_model_parallel_size"):
        if not isinstance(OmegaConf.select(cfg, key), int) or OmegaConf.select(cfg, key) < 1:
            problems.append(f"{key} is {OmegaConf.select(cfg, key)!r}; it must be a whole number of at least 1")
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as err:
        problems.append(" ".join(str(err).split()))
    if problems:
        raise ConfigError("this training cannot start:\n" + "\n".join(f"  - {problem}" for problem in problems))


def _problems(cfg: DictConfig, base: Any) -> Iterator[str]:
    model, sft = cfg.model, cfg.trainer.sft
    tp, pp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size
    cp = model.context_parallel_size
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    if ranks % (tp * pp * cp):
        context = f" x context_parallel_size {cp}" if cp != 1 else ""
        yield (
            f"tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp}{context} = {tp * pp * cp} ranks, but "
            f"trainer.devices {cfg.trainer.devices} x trainer.num_nodes {cfg.trainer.num_nodes} = {ranks}; "
            f"set trainer.devices={tp * pp * cp} or a multiple"
        )
    for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size"):
        value = base.get(key)
        if value and value % tp:
            yield f"tensor_model_parallel_size {tp} does not divide the checkpoint's {key} {value}"
    if base.get("num_layers", pp) % pp:
        yield f"pipeline_model_parallel_size {pp} does not divide the checkpoint's num_layers {base['num_layers']}"
    yield from _batch_problems(cfg)
    for key in ("train_ds", "validation_ds"):
        if not Path(model.data[key].file_path).is_file():
            what = "is a folder" if Path(model.data[key].file_path).is_dir() else "does not exist"
            yield f"model.data.{key}.file_path: {model.data[key].file_path} {what}; give a JSONL file of records"
        workers = model.data[key].memmap_workers
        if workers is not None and (not isinstance(workers, int) or workers < 1):
            yield f"model.data.{key}.memmap_workers is {workers!r}; it must be a number of processes or null"
    if not model.data.chat:
        yield "model.data.chat is False; this program trains on conversations only"
    if not model.data.train_ds.drop_last:
        yield "model.data.train_ds.drop_last must be True: the trainer knows whole batches only"
    if not isinstance(model.data.train_ds.group_by_length, bool):
        yield f"model.data.train_ds.group_by_length is {model.data.train_ds.group_by_length!r}; true or false"
    if model.data.record_type not in (None, *RECORD_TYPES):
        yield f"model.data.record_type is {model.data.record_type!r}; it must be {' or '.join(RECORD_TYPES)} or null"
    if model.peft.peft_scheme not in (None, "none"):
        yield f"model.peft.peft_scheme {model.peft.peft_scheme!r} is not supported; full fine-tuning is 'none'"
    interval = sft.val_check_interval
    if not isinstance(sft.save_interval, (int, float)) or sft.save_interval <= 0:
        yield f"trainer.sft.save_interval is {sft.save_interval}; without saving a stopped run cannot go on"
        return
    if str(cfg.trainer.precision) not in PRECISIONS:
        yield f"trainer.precision is {cfg.trainer.precision!r}; use one of {', '.join(PRECISIONS)}"
    if isinstance(interval, int) and interval > 0 and sft.save_interval % interval:
        yield f"trainer.sft.save_interval {sft.save_interval} must be a multiple of val_check_interval {interval}"
    for placeholder in ("{step}", "{consumed_samples}"):
        if placeholder not in cfg.exp_manager.checkpoint_callback_params.filename:
            yield f"checkpoint_callback_params.filename lacks {placeholder}: resuming reads the state from the name"
    yield from _schedule_problems(model.optim)
    for read in (read_template, read_schema):
        try:
            read(cfg)
        except SteerLMError as err:
            yield str(err)


PRECISIONS = ("32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed")


def _batch_problems(cfg: DictConfig) -> Iterator[str]:
    data_parallel = max(1, data_parallel_size(cfg))
    for key in ("train_ds", "validation_ds"):
        ds = cfg.model.data[key]
        per_step = ds.micro_batch_size * data_parallel
        if per_step < 1 or ds.global_batch_size % per_step:
            yield (
                f"model.data.{key}.global_batch_size ({ds.global_batch_size}) is not divisible by "
                f"micro_batch_size ({ds.micro_batch_size}) x data_parallel_size ({data_parallel})"
            )


def _schedule_problems(optim: DictConfig) -> Iterator[str]:
    if not 0 < optim.lr < math.inf:
        yield f"model.optim.lr is {optim.lr}; it must be above 0"
    sched = optim.get("sched")
    if sched is not None and sched.name == "CosineAnnealing" and sched.constant_steps > 0 and optim.lr <= sched.min_lr:
        yield f"model.optim.lr {optim.lr} must be above sched.min_lr {sched.min_lr} when constant_steps is set"


def check_schedule(cfg: DictConfig, num_steps: int) -> None:
    """Refuse a schedule that falls to min_lr right after warm-up and stays there (D-25).

    Raises:
        ConfigError: warm-up and constant tail leave no step for the cosine.
    """
    sched = cfg.model.optim.get("sched")
    if sched is None or sched.name != "CosineAnnealing":
        return
    if sched.warmup_steps + sched.constant_steps >= num_steps:
        raise ConfigError(
            f"model.optim.sched: warmup_steps {sched.warmup_steps} + constant_steps {sched.constant_steps} leave no "
            f"step of the {num_steps} for the cosine; the rate would drop to min_lr after warm-up. Lower "
            "warmup_steps, and set constant_steps=0: it is a tail at min_lr"
        )


def warnings(cfg: DictConfig, base: Any) -> Iterator[str]:
    """Settings that run but are probably not meant."""
    damaged: list[str] = []
    read_template(cfg, damaged.append)
    yield from damaged
    data, limit = cfg.model.data, base.get("encoder_seq_length")
    if data.validation_ds.max_seq_length > data.train_ds.max_seq_length:
        yield (
            f"validation_ds.max_seq_length {data.validation_ds.max_seq_length} is above "
            f"train_ds.max_seq_length {data.train_ds.max_seq_length}"
        )
    if limit and data.train_ds.max_seq_length > limit:
        yield f"train_ds.max_seq_length {data.train_ds.max_seq_length} is above the checkpoint's context of {limit}"
