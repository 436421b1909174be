"""Checking a training configuration before NeMo is imported and before any rank is started.

Every problem found is reported together. What only one method has is checked by that method's row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from steerlm_nemo.attributes import NEMO12_LANG, AttributeSchema, load_schema
from steerlm_nemo.config import CONFIG_DIR
from steerlm_nemo.errors import ConfigError, InputError, listed, shown
from steerlm_nemo.models.loading import undivided
from steerlm_nemo.record_report import RecordReport, report_beside
from steerlm_nemo.records import require_file
from steerlm_nemo.template import ChatTemplate
from steerlm_nemo.training.method import Method

PRECISIONS = ("32", "32-true", "16", "16-mixed", "bf16", "bf16-mixed")


def read_template(cfg: DictConfig, warn: Callable[[str], object] = lambda message: None) -> ChatTemplate:
    """The chat template of `model.data.chat_prompt_tokens`; `warn` hears of markers that a shell damaged."""
    return ChatTemplate.from_config(OmegaConf.to_container(cfg.model.data.chat_prompt_tokens), warn)  # type: ignore[arg-type]


class ChosenSchema(NamedTuple):
    """An attribute schema and, in words, why it is the one."""

    schema: AttributeSchema
    why: str


def choose_schema(cfg: DictConfig) -> ChosenSchema:
    """The attribute schema of `model.data.attribute_schema`; else that which the reports beside the records tell.

    Raises:
        InputError: no such schema, or a report that cannot be read.
        ConfigError: the two files of records tell different schemas.
    """
    if (asked := cfg.model.data.attribute_schema) is not None:
        return ChosenSchema(load_schema(str(asked)), "as model.data.attribute_schema says")
    told = [*told_schemas(cfg)]
    if not told:
        return ChosenSchema(NEMO12_LANG, "the default: no report beside the records tells another")
    (schema, where), *others = told
    for other, elsewhere in others:
        if other != schema:
            raise ConfigError(
                f"training and validation records differ: {where} tells {described(schema)}, {elsewhere} tells "
                f"{described(other)}; preprocess both alike, or set model.data.attribute_schema to what holds for both"
            )
    return ChosenSchema(schema, f"as {where} tells")


def reports(cfg: DictConfig) -> Collection[RecordReport]:
    """Those beside the files of records; the sides of a split share one. Raises InputError: one cannot be read."""
    found = [report_beside(ds.file_path) for ds in (cfg.model.data.train_ds, cfg.model.data.validation_ds)]
    return {report.path: report for report in found if report is not None}.values()


def told_schemas(cfg: DictConfig) -> Iterator[tuple[AttributeSchema, Path]]:
    """The schemas that these reports tell, and where. Raises InputError."""
    for report in reports(cfg):
        if (schema := report.schema) is not None:
            yield schema, report.path


def described(schema: AttributeSchema) -> str:
    """A schema in a message: two of the same name may differ."""
    scales = listed(f"{one.name} {one.minimum}-{one.maximum}" for one in schema.attributes)
    return f"schema {schema.name} ({scales}{', lang' if schema.languages else ''})"


def read_schema(cfg: DictConfig) -> AttributeSchema:
    """The schema of `choose_schema`, without its reason."""
    return choose_schema(cfg).schema


def model_name(cfg: DictConfig, method: Method) -> str:
    """What the trained model is called: `name` where the run was given one, else its log folder's.

    Two models of one flow have two log folders, but the same default `name`, which is that of the file.
    """
    if cfg.name != OmegaConf.load(CONFIG_DIR / f"{method.default_config}.yaml").name:
        return str(cfg.name)
    return Path(cfg.exp_manager.explicit_log_dir).resolve().name


def data_parallel_size(cfg: DictConfig) -> int:
    """Number of model replicas; exact only for a config that passed `check`."""
    model = cfg.model
    model_ranks = model.tensor_model_parallel_size * model.pipeline_model_parallel_size * model.context_parallel_size
    return cfg.trainer.num_nodes * cfg.trainer.devices // model_ranks


def check(cfg: DictConfig, base: Mapping[str, Any], method: Method) -> None:
    """Refuse a training configuration that cannot run. `base` is the model config of the checkpoint to start from.

    Fills in `model.encoder_seq_length` from it where the run leaves it open.

    Raises:
        ConfigError: lists every problem found.
    """
    if cfg.model.encoder_seq_length is None:
        cfg.model.encoder_seq_length = base.get("encoder_seq_length")
        if cfg.model.encoder_seq_length is None:
            raise ConfigError("the checkpoint does not say how long its context is; set model.encoder_seq_length")
    _raise_if_any(_problems(cfg, base, method))


def require_values(cfg: DictConfig) -> None:
    """Raise ConfigError naming every key that must be given and is not, or whose interpolation fails."""
    _raise_if_any(_missing(cfg))


def _raise_if_any(problems: Iterable[str]) -> None:
    if found := [f"  - {problem}" for problem in problems]:
        raise ConfigError("\n".join(["this training cannot start:", *found]))


def _missing(cfg: DictConfig) -> Iterator[str]:
    yield from (f"{key} is not set" for key in sorted(OmegaConf.missing_keys(cfg)))
    if cfg.exp_manager.explicit_log_dir is None:
        yield "exp_manager.explicit_log_dir is not set; give every run a folder of its own"
    for key in ("trainer.devices", "trainer.num_nodes", "model.tensor_model_parallel_size"):
        value = OmegaConf.select(cfg, key)
        if not isinstance(value, int) or value < 1:
            yield f"{key} is {value!r}; it must be a whole number of at least 1"
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as err:
        yield " ".join(str(err).split())


def _problems(cfg: DictConfig, base: Mapping[str, Any], method: Method) -> Iterator[str]:
    yield from _parallel_problems(cfg, base)
    for split in method.splits(cfg):
        try:
            require_file(split.file_path)
        except InputError as err:
            yield f"{split.key}.file_path: {err}; give a JSONL file of records"
        per_step = split.micro_batch_size * max(1, data_parallel_size(cfg))
        if per_step < 1 or split.global_batch_size % per_step:
            yield (
                f"{split.key}.global_batch_size ({split.global_batch_size}) is not divisible by micro_batch_size "
                f"({split.micro_batch_size}) x data_parallel_size ({max(1, data_parallel_size(cfg))})"
            )
        if not isinstance(split.group_by_length, bool):
            yield f"{split.key}.group_by_length is {split.group_by_length!r}; true or false"
    if str(cfg.trainer.precision) not in PRECISIONS:
        yield f"trainer.precision is {cfg.trainer.precision!r}; use one of {', '.join(PRECISIONS)}"
    yield from _saving_problems(cfg, method)
    yield from _schedule_problems(cfg.model.optim)
    yield from method.problems(cfg)


def _parallel_problems(cfg: DictConfig, base: Mapping[str, Any]) -> Iterator[str]:
    model = cfg.model
    tp, pp, cp = model.tensor_model_parallel_size, model.pipeline_model_parallel_size, model.context_parallel_size
    ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    if ranks % (tp * pp * cp):
        context = f" x context_parallel_size {cp}" if cp != 1 else ""
        yield (
            f"tensor_model_parallel_size {tp} x pipeline_model_parallel_size {pp}{context} = {tp * pp * cp} ranks, but "
            f"trainer.devices {cfg.trainer.devices} x trainer.num_nodes {cfg.trainer.num_nodes} = {ranks}; "
            f"set trainer.devices={tp * pp * cp} or a multiple"
        )
    yield from undivided(base, tp)
    if base.get("num_layers", pp) % pp:
        yield f"pipeline_model_parallel_size {pp} does not divide the checkpoint's num_layers {base['num_layers']}"


def _saving_problems(cfg: DictConfig, method: Method) -> Iterator[str]:
    settings = method.settings(cfg)
    interval, save_interval = settings.val_check_interval, settings.save_interval
    if not isinstance(save_interval, (int, float)) or save_interval <= 0:
        yield f"{method.key('save_interval')} is {save_interval}; without saving a stopped run cannot go on"
    elif isinstance(interval, int) and interval > 0 and save_interval % interval:
        yield f"{method.key('save_interval')} {save_interval} must be a multiple of val_check_interval {interval}"
    for placeholder in ("{step}", "{consumed_samples}"):
        if placeholder not in cfg.exp_manager.checkpoint_callback_params.filename:
            yield f"checkpoint_callback_params.filename lacks {placeholder}: resuming reads the state from the name"


def _schedule_problems(optim: DictConfig | None) -> Iterator[str]:
    if optim is None:
        yield "model.optim is null; a training needs an optimizer, with name, lr and the rest of gpt_sft.yaml's section"
        return
    sched = optim.get("sched")
    for key, section, names in (("model.optim", optim, ["lr"]), ("model.optim.sched", sched, _OF_COSINE)):
        if section is None or (section is sched and sched.get("name") != "CosineAnnealing"):
            continue
        if wrong := [name for name in names if not _is_number(section.get(name))]:
            yield from (f"{key}.{name} is {shown(section.get(name))}; it must be a number" for name in wrong)
            return
    if not 0 < optim.lr < math.inf:
        yield f"model.optim.lr is {optim.lr}; it must be above 0"
    if (
        sched is not None
        and sched.get("name") == "CosineAnnealing"
        and sched.constant_steps > 0
        and optim.lr <= sched.min_lr
    ):
        yield f"model.optim.lr {optim.lr} must be above sched.min_lr {sched.min_lr} when constant_steps is set"


_OF_COSINE = ("warmup_steps", "constant_steps", "min_lr")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_schedule(cfg: DictConfig, num_steps: int) -> None:
    """Refuse a schedule that falls to min_lr right after warm-up and stays there (D-25).

    Raises:
        ConfigError: warm-up and constant tail leave no step for the cosine.
    """
    sched = cfg.model.optim.get("sched")
    if sched is None or sched.get("name") != "CosineAnnealing":
        return
    if sched.warmup_steps + sched.constant_steps >= num_steps:
        raise ConfigError(
            f"model.optim.sched: warmup_steps {sched.warmup_steps} + constant_steps {sched.constant_steps} leave no "
            f"step of the {num_steps} for the cosine; the rate would drop to min_lr after warm-up. Lower "
            "warmup_steps, and set constant_steps=0: it is a tail at min_lr"
        )
