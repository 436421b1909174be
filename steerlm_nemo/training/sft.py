"""One rank of a supervised fine-tuning run: NeMo-Aligner's trainer around NeMo's GPT model.

The loop, optimizer, schedule, checkpoints and loggers are NVIDIA's (nemo_aligner.algorithms.supervised, NeMo's
exp_manager). Here: what goes in, what comes out, and the refusals the reference lacks (D-03 to D-06, D-11, D-24).
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from steerlm_nemo.checkpoint.archive import open_nemo, read_config, write_nemo
from steerlm_nemo.checkpoint.safety import check_directory
from steerlm_nemo.checkpoint.tokenizer_files import load_tokenizer, localise_tokenizer, read_artifacts
from steerlm_nemo.compat import prepare, quiet_logs
from steerlm_nemo.config import printable
from steerlm_nemo.errors import CheckpointError, ConfigError, SteerLMError
from steerlm_nemo.model_kind import SteerLMFormat, kind_trained_on
from steerlm_nemo.training import config as training_config
from steerlm_nemo.training.batching import grouped_by_length, padding_share
from steerlm_nemo.training.datasets.chat import ChatDataset
from steerlm_nemo.training.fingerprint import file_identity, fingerprint

EXIT_STOPPED_EARLY = 75  # EX_TEMPFAIL: the same command goes on where this one stopped; Slurm scripts requeue on it


class StoppedEarlyError(SteerLMError):
    """The run saved and stopped because of a signal or its time limit."""

    exit_code = EXIT_STOPPED_EARLY


def run(cfg: DictConfig) -> None:
    """Train on this rank until done. `cfg` has passed `training.config.check`.

    Raises:
        SteerLMError: the data, the checkpoint or a resumed run does not fit the config.
        StoppedEarlyError: stopped by a signal or `exp_manager.max_time_per_run`, after saving.
    """
    is_first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
    log_dir = Path(cfg.exp_manager.explicit_log_dir)
    identity = fingerprint(cfg)  # of what was asked for, before it is adapted to this machine
    for checkpoint in (*log_dir.glob("checkpoints/*last"), *log_dir.glob("checkpoints/*end")):
        check_resumable(checkpoint)  # before NeMo starts; what exp_manager then chooses is checked once more
    capabilities = prepare()
    quiet_logs(verbose=bool(cfg.get("verbose", False)))
    if is_first:
        print("\n".join(capabilities.lines()), flush=True)

    from nemo.utils.exp_manager import exp_manager
    from nemo_aligner.models.nlp.gpt.gpt_sft_model import GPTSFTModel
    from nemo_aligner.utils.train_script_utils import (
        CustomLoggerWrapper,
        add_custom_checkpoint_callback,
        extract_optimizer_scheduler_from_ptl_model,
        init_distributed,
        init_using_ptl,
        resolve_and_create_trainer,
        retrieve_custom_trainer_state_dict,
    )
    from nemo_aligner.utils.utils import load_from_nemo

    from steerlm_nemo.compat.model_config import for_this_machine
    from steerlm_nemo.training.trainer import RunTimer, SFTTrainer

    base = read_config(cfg.model.restore_from_path)
    intended = merge_model_config(base, cfg.model)
    cfg.model = for_this_machine(intended, capabilities)
    _check_optimizer(cfg.model.optim)
    precision = cfg.trainer.precision
    ptl_trainer = resolve_and_create_trainer(cfg, "sft")
    cfg.trainer.precision = precision
    exp_manager_cfg = cfg.exp_manager.copy()
    with open_dict(exp_manager_cfg):
        # The .nemo is written below: NeMo writes it in place, next to whatever lies there (D-33).
        exp_manager_cfg.checkpoint_callback_params.save_nemo_on_train_end = False
    exp_manager(ptl_trainer, exp_manager_cfg)
    if ptl_trainer.ckpt_path is not None:
        check_resumable(Path(ptl_trainer.ckpt_path))
    _start_loggers(ptl_trainer.loggers)
    logger = CustomLoggerWrapper(ptl_trainer.loggers)

    with open_nemo(cfg.model.restore_from_path) as nemo:
        with open_dict(cfg.model):
            cfg.model.tokenizer = localise_tokenizer(nemo.config, nemo.dir)["tokenizer"]
        model = load_from_nemo(GPTSFTModel, cfg.model, ptl_trainer, strict=True, restore_path=str(nemo.dir))
        tokenizer = load_tokenizer(nemo)
        artifacts = read_artifacts(nemo)
    state = retrieve_custom_trainer_state_dict(ptl_trainer)
    init_distributed(ptl_trainer, model, cfg.model.get("transformer_engine", False))

    train_ds, val_ds, steerlm_format = _load_data(cfg, tokenizer, is_first)
    train_loader, val_loader = _loaders(cfg, train_ds, val_ds, state)
    num_steps = _num_steps(cfg, train_ds)
    training_config.check_schedule(cfg, num_steps)
    with open_dict(model.cfg):
        # The cosine must end where training ends, also when the data is shorter than max_steps (reference 7.3).
        if model.cfg.optim.get("sched") is not None:
            model.cfg.optim.sched.setdefault("max_steps", num_steps)
    init_using_ptl(ptl_trainer, model, train_loader, train_ds)
    optimizer, scheduler = extract_optimizer_scheduler_from_ptl_model(model)
    checkpoint_callback = add_custom_checkpoint_callback(ptl_trainer, model)
    if is_first:
        _save_run_files(cfg, log_dir, identity, capabilities.as_dict())
    logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))

    timer = RunTimer(cfg.exp_manager.get("max_time_per_run"))
    signal.signal(signal.SIGTERM, timer.request_stop)
    signal.signal(signal.SIGINT, timer.request_stop)
    trainer = SFTTrainer(
        cfg=cfg.trainer.sft,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=train_loader,
        val_dataloader=val_loader,
        test_dataloader=None,
        logger=logger,
        ckpt_callback=checkpoint_callback,
        run_timer=timer,
    )
    if state is not None:
        trainer.load_state_dict(state)
        if is_first:
            print(f"resuming at step {trainer.step} of {trainer.max_steps}", flush=True)
    started = time.monotonic()
    trainer.fit()
    if trainer.step < trainer.max_steps:
        raise StoppedEarlyError(
            f"stopped at step {trainer.step} of {trainer.max_steps} and saved; run the same command again to go on"
        )
    if cfg.exp_manager.checkpoint_callback_params.save_nemo_on_train_end:
        target = log_dir / "checkpoints" / f"{cfg.name}.nemo"
        config = saved_config(base, intended, steerlm_format, cfg)
        _save_nemo(model, config, artifacts, target)
        if is_first:
            print(f"trained {trainer.step} steps in {time.monotonic() - started:.0f} s; wrote {target}", flush=True)


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


def _check_optimizer(optim: DictConfig) -> None:
    """Refuse names that NeMo's registries lack. Only NeMo knows them, so this waits until it is imported.

    Raises:
        ConfigError: no such optimizer or schedule; names the nearest.
    """
    from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS
    from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS

    # NeMo builds Megatron Core's own optimizer without its registry.
    known = {"model.optim.name": [*AVAILABLE_OPTIMIZERS, "mcore_distributed_optim"]}
    chosen = {"model.optim.name": optim.name}
    if optim.get("sched") is not None:
        known["model.optim.sched.name"] = list(AVAILABLE_SCHEDULERS)
        chosen["model.optim.sched.name"] = optim.sched.name
    for key, name in chosen.items():
        if name not in known[key]:
            near = difflib.get_close_matches(str(name), known[key], n=1)
            hint = f"did you mean {near[0]}?" if near else f"NeMo has {', '.join(sorted(known[key]))}"
            raise ConfigError(f"{key}: there is no {name!r}; {hint}")


def _start_loggers(loggers: list[Any]) -> None:
    """Open every logger now: a missing login is better learnt before the model is loaded than at the first step."""
    for logger in loggers:
        try:
            _ = logger.experiment
        except Exception as err:
            if not type(err).__module__.startswith("wandb"):
                raise
            raise ConfigError(
                f"exp_manager.create_wandb_logger: {err} Log in with `wandb login`, or set WANDB_MODE=offline"
            ) from err


def merge_model_config(base: Mapping[str, Any], override: DictConfig) -> DictConfig:
    """The checkpoint's model config with the run's on top; a null in the run's keeps the checkpoint's value."""
    merged = OmegaConf.create(dict(base))
    OmegaConf.resolve(override)
    with open_dict(merged):
        for key in ("target", "nemo_version", "data", "optim"):
            merged.pop(key, None)
        for name, value in OmegaConf.to_container(override).items():  # type: ignore[union-attr]
            if value is not None or name not in merged:
                merged[name] = value
        # Aligner counts consumed samples with the model's own copy of the batch size.
        merged.micro_batch_size = override.data.train_ds.micro_batch_size
        merged.global_batch_size = override.data.train_ds.global_batch_size
    return merged


def _load_data(cfg: DictConfig, tokenizer: Any, is_first: bool) -> tuple[ChatDataset, ChatDataset, SteerLMFormat]:
    template = training_config.read_template(cfg)
    datasets = []
    for key in ("train_ds", "validation_ds"):
        ds = cfg.model.data[key]
        dataset = ChatDataset(
            ds.file_path,
            tokenizer,
            template,
            ds.max_seq_length,
            cfg.model.data.pad_seq_length_to_mult,
            cfg.model.data.record_type,
            training_config.read_schema(cfg),
            ds.memmap_workers or 1,
        )
        if is_first:
            print(dataset.report.line(), flush=True)
        limited_out = key == "validation_ds" and cfg.trainer.sft.limit_val_batches == 0
        if len(dataset) < ds.global_batch_size and not limited_out:
            hint = " or trainer.sft.limit_val_batches=0" if key == "validation_ds" else ""
            raise ConfigError(
                f"{ds.file_path} has {len(dataset)} usable conversations, fewer than model.data.{key}."
                f"global_batch_size {ds.global_batch_size}; lower it{hint}"
            )
        datasets.append(dataset)
        if key == "train_ds" and is_first:
            print(_padding_line(dataset, ds, cfg.model.seed), flush=True)
    train, val = datasets
    if train.record_type != val.record_type:
        raise ConfigError(f"training records are {train.record_type}, validation records {val.record_type}")
    return train, val, SteerLMFormat(template, training_config.read_schema(cfg), kind_trained_on(train.record_type))


def _padding_line(dataset: ChatDataset, ds: DictConfig, seed: int) -> str:
    """How much of the batches of the first epoch is padding, with and without grouping."""
    lengths, size = dataset.lengths, ds.global_batch_size
    as_they_come = [list(range(start, start + size)) for start in range(0, len(lengths) - size + 1, size)]
    shares = {
        False: padding_share(as_they_come, lengths, dataset.pad_to_multiple),
        True: padding_share(grouped_by_length(lengths, size, seed), lengths, dataset.pad_to_multiple),
    }
    other = "without" if ds.group_by_length else "with"
    return (
        f"padding: {shares[ds.group_by_length]:.0%} of the training batches, {shares[not ds.group_by_length]:.0%} "
        f"{other} model.data.train_ds.group_by_length"
    )


def _loaders(cfg: DictConfig, train_ds: ChatDataset, val_ds: ChatDataset, state: dict[str, Any] | None) -> tuple:
    from nemo_aligner.data.nlp.builders import build_dataloader

    common = {"cfg": cfg, "drop_last": True, "load_gbs": True}
    train = cfg.model.data.train_ds
    val = cfg.model.data.validation_ds
    train_loader = build_dataloader(
        dataset=train_ds,
        consumed_samples=state["consumed_samples"] if state else 0,
        mbs=train.micro_batch_size,
        gbs=train.global_batch_size,
        collate_fn=train_ds.collate_fn,
        **common,
    )
    return (
        _grouped(train_loader, train_ds) if train.group_by_length else train_loader,
        build_dataloader(
            dataset=val_ds,
            consumed_samples=0,
            mbs=val.micro_batch_size,
            gbs=val.global_batch_size,
            collate_fn=val_ds.collate_fn,
            use_random_sampler=False,
            **common,
        ),
    )


def _grouped(loader: Any, dataset: ChatDataset) -> Any:
    """The same loader with batches of similar length."""
    import torch

    from steerlm_nemo.training.trainer import LengthGroupedSampler

    plain = loader.batch_sampler
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
        dataset,
        batch_sampler=sampler,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        collate_fn=loader.collate_fn,
    )


def _num_steps(cfg: DictConfig, train_ds: ChatDataset) -> int:
    """Optimizer steps this run will take: what the data gives, or max_steps if that is less."""
    from nemo_aligner.utils.trainer_utils import compute_limit_batches

    per_epoch = compute_limit_batches(
        len(train_ds) // cfg.model.data.train_ds.global_batch_size, cfg.trainer.sft.limit_train_batches
    )
    from_data = per_epoch * cfg.trainer.sft.max_epochs
    return from_data if cfg.trainer.sft.max_steps < 0 else min(from_data, cfg.trainer.sft.max_steps)


def _save_run_files(cfg: DictConfig, log_dir: Path, identity: dict[str, Any], capabilities: dict[str, Any]) -> None:
    checkpoints = log_dir / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    (checkpoints / "run.json").write_text(json.dumps(identity, indent=1))
    (log_dir / "capabilities.json").write_text(json.dumps(capabilities, indent=1))
    (log_dir / "config.yaml").write_text(printable(cfg))


# --- the result -------------------------------------------------------------------------------------------------


def saved_config(base: Any, intended: DictConfig, fmt: SteerLMFormat, cfg: DictConfig) -> DictConfig:
    """The `model_config.yaml` of the result: what the user asked for, not what was adapted to this machine."""
    config = intended.copy()
    with open_dict(config):
        config.target = "nemo_aligner.models.nlp.gpt.gpt_sft_model.GPTSFTModel"
        config.nemo_version = base.get("nemo_version")
        config.tokenizer = base["tokenizer"]
        config[SteerLMFormat.CONFIG_KEY] = fmt.to_dict()
        config.steerlm_provenance = _provenance(cfg)
    return config


def _save_nemo(model: Any, config: DictConfig, artifacts: dict[str, bytes], target: Path) -> None:
    """Write `target`, all ranks together; it appears under its name when complete.

    The weights go through NeMo's distributed checkpoint writer into a private folder. NeMo's own `save_to` writes
    `model_weights/` next to its target, where an older one may lie (D-33).
    """
    import torch
    from nemo.utils.callbacks.dist_ckpt_io import DistributedCheckpointIO

    staging = target.parent / f".{target.name}.staging"
    is_first = torch.distributed.get_rank() == 0
    if is_first:
        shutil.rmtree(staging, ignore_errors=True)  # of a run that was killed here
        staging.mkdir(parents=True)
    torch.distributed.barrier()
    writer = DistributedCheckpointIO.from_config(model.cfg, async_save=False)
    writer.save_checkpoint(model.sharded_state_dict(), str(staging / "model_weights"))
    torch.distributed.barrier()
    if is_first:
        for name, content in artifacts.items():
            (staging / name).write_bytes(content)
        OmegaConf.save(config, staging / "model_config.yaml")
        write_nemo(staging, target)
        shutil.rmtree(staging)
    torch.distributed.barrier()


def _provenance(cfg: DictConfig) -> dict[str, Any]:
    return {
        "base": str(cfg.model.restore_from_path),
        "train_file": file_identity(cfg.model.data.train_ds.file_path),
        "seed": cfg.model.seed,
    }
