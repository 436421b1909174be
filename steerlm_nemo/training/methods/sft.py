"""Supervised fine-tuning: a value model learns from TEXT_TO_VALUE records, a SteerLM model from VALUE_TO_TEXT ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from steerlm_nemo.attributes import digest_of
from steerlm_nemo.conversation import RECORD_TYPES
from steerlm_nemo.errors import ConfigError, SteerLMError, shown
from steerlm_nemo.model_kind import SteerLMFormat, kind_trained_on
from steerlm_nemo.template import Tokenizer
from steerlm_nemo.training.config import (
    choose_schema,
    described,
    read_schema,
    read_template,
    reports,
    told_schemas,
)
from steerlm_nemo.training.method import Data, Method, Split, Splits


def _splits(cfg: DictConfig) -> Splits:
    def split(key: str, group_by_length: bool) -> Split:
        ds = cfg.model.data[key]
        return Split(f"model.data.{key}", ds.file_path, ds.micro_batch_size, ds.global_batch_size, group_by_length)

    return Splits(split("train_ds", cfg.model.data.train_ds.group_by_length), split("validation_ds", False))


def _problems(cfg: DictConfig) -> Iterator[str]:
    data = cfg.model.data
    if not data.chat:
        yield "model.data.chat is False; this program trains on conversations only"
    if cfg.trainer.sft.get("inference_metrics") is not None:
        yield "trainer.sft.inference_metrics: validation measures the loss; it does not generate"
    if data.record_type not in (None, *RECORD_TYPES):
        yield f"model.data.record_type is {data.record_type!r}; it must be {' or '.join(RECORD_TYPES)} or null"
    for key in ("train_ds", "validation_ds"):
        workers = data[key].memmap_workers
        if workers is not None and (not isinstance(workers, int) or workers < 1):
            yield f"model.data.{key}.memmap_workers is {workers!r}; it must be a number of processes or null"
    for read in (read_template, read_schema):
        try:
            read(cfg)
        except SteerLMError as err:
            yield str(err)


def _warnings(cfg: DictConfig, base: Mapping[str, Any]) -> Iterator[str]:
    damaged: list[str] = []
    read_template(cfg, damaged.append)
    yield from damaged
    train, validation = cfg.model.data.train_ds, cfg.model.data.validation_ds
    yield from _other_than_before(cfg)
    if validation.max_seq_length > train.max_seq_length:
        yield (
            f"validation_ds.max_seq_length {validation.max_seq_length} is above "
            f"train_ds.max_seq_length {train.max_seq_length}"
        )
    limit = base.get("encoder_seq_length")
    if limit and train.max_seq_length > limit:
        yield f"train_ds.max_seq_length {train.max_seq_length} is above the checkpoint's context of {limit}"


def _other_than_before(cfg: DictConfig) -> Iterator[str]:
    """Where this run differs from what the steps before it did to the records, as the reports beside them tell."""
    template, schema = read_template(cfg), read_schema(cfg)
    for told, where in told_schemas(cfg):
        if told != schema:
            yield f"model.data.attribute_schema is {described(schema)}, but {where} tells {described(told)}"
    for report in reports(cfg):
        markers = report.facts.get("template")
        if isinstance(markers, dict) and markers != asdict(template):
            differing = [name for name, marker in asdict(template).items() if markers.get(name) != marker]
            yield (
                f"{report.path}: the records were cleaned with other markers than model.data.chat_prompt_tokens has ("
                + ", ".join(f"{name} {shown(markers.get(name))}" for name in differing)
                + "); clean them with --template_from"
            )


def _identity(cfg: DictConfig) -> dict[str, Any]:
    data, schema = cfg.model.data, read_schema(cfg)
    return {
        "record_type": data.record_type,
        "template": asdict(read_template(cfg)),
        # Not its path: a file can be edited between a run and its resumption.
        "attribute_schema": f"{schema.name} ({digest_of(schema.to_dict())})",
        "max_seq_length": data.train_ds.max_seq_length,
    }


def _load_data(cfg: DictConfig, tokenizer: Tokenizer, report: Callable[[str], object]) -> Data:
    """Both files, tokenised. Raises ConfigError if their records are of different types."""
    from steerlm_nemo.training.datasets.chat import ChatDataset

    template, (schema, why), data = read_template(cfg), choose_schema(cfg), cfg.model.data
    tokenizer = tokenizer.for_template(astuple(template))
    report(f"attributes: {described(schema)}, {why}")

    def load(ds: DictConfig) -> ChatDataset:
        dataset = ChatDataset(
            ds.file_path,
            tokenizer,
            template,
            ds.max_seq_length,
            data.pad_seq_length_to_mult,
            data.record_type,
            schema,
            ds.memmap_workers or 1,
        )
        report(dataset.report.line())
        return dataset

    train, validation = load(data.train_ds), load(data.validation_ds)
    if train.record_type != validation.record_type:
        raise ConfigError(f"training records are {train.record_type}, validation records {validation.record_type}")
    return Data(train, validation, SteerLMFormat(template, schema, kind_trained_on(train.record_type)))


def _load_model(cfg: DictConfig, ptl_trainer: Any, folder: Path) -> Any:
    from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
    from nemo_aligner.utils.utils import load_from_nemo

    return load_from_nemo(GPTSFTModel, cfg.model, ptl_trainer, strict=True, restore_path=str(folder))


def _trainer_class() -> type[Any]:
    from steerlm_nemo.training.trainer import GuardedTrainer

    return GuardedTrainer


SFT = Method(
    name="sft",
    default_config="gpt_sft",
    splits=_splits,
    problems=_problems,
    warnings=_warnings,
    identity=_identity,
    load_data=_load_data,
    load_model=_load_model,
    trainer_class=_trainer_class,
)
