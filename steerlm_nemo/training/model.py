"""The model of a run: the base checkpoint, as the config wants it. Imported after `compat.prepare`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NamedTuple

from nemo.core.optim.lr_scheduler import AVAILABLE_SCHEDULERS
from nemo.core.optim.optimizers import AVAILABLE_OPTIMIZERS
from nemo_aligner.utils.train_script_utils import (
    extract_optimizer_scheduler_from_ptl_model,
    init_distributed,
    init_using_ptl,
)
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from steerlm_nemo.checkpoint.archive import open_nemo
from steerlm_nemo.checkpoint.tokenizer_files import load_tokenizer, localise_tokenizer, read_artifacts
from steerlm_nemo.compat.layers import complete_qk_norm_gradients
from steerlm_nemo.errors import ConfigError, clipped
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer
from steerlm_nemo.training.loaders import Loaders
from steerlm_nemo.training.method import Method, Split


class Base(NamedTuple):
    """The checkpoint to start from, loaded. `artifacts` are its tokenizer files, by member name."""

    model: Any
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer
    artifacts: dict[str, bytes]


def merge_model_config(base: Mapping[str, Any], override: DictConfig, train: Split) -> DictConfig:
    """The checkpoint's model config with the run's on top; a null in the run's keeps the checkpoint's value."""
    merged = OmegaConf.create(dict(base))
    settings: Any = OmegaConf.to_container(override, resolve=True)
    with open_dict(merged):
        for key in ("target", "nemo_version", "data", "optim"):
            merged.pop(key, None)
        for name, value in settings.items():
            if value is not None or name not in merged:
                merged[name] = value
        # Aligner counts consumed samples with the model's own copy of the batch size.
        merged.micro_batch_size, merged.global_batch_size = train.micro_batch_size, train.global_batch_size
    return merged


def check_optimizer(optim: DictConfig) -> None:
    """Refuse names that NeMo's registries lack. Only NeMo knows them, so this waits until it is imported.

    Raises:
        ConfigError: no such optimizer or schedule; names the nearest.
    """
    # NeMo builds Megatron Core's own optimizer without its registry.
    known = {"model.optim.name": [*AVAILABLE_OPTIMIZERS, "mcore_distributed_optim"]}
    chosen = {"model.optim.name": optim.get("name")}
    if optim.get("sched") is not None:
        known["model.optim.sched.name"] = list(AVAILABLE_SCHEDULERS)
        chosen["model.optim.sched.name"] = optim.sched.get("name")
    for key, name in chosen.items():
        if name not in known[key]:
            near = difflib.get_close_matches(str(name), known[key], n=1)
            hint = f"did you mean {near[0]}?" if near else f"NeMo has {', '.join(sorted(known[key]))}"
            raise ConfigError(f"{key}: there is no {name!r}; {hint}")


def load_base(cfg: DictConfig, method: Method, ptl_trainer: Any) -> Base:
    """The base as the method wants it, on this rank; torch.distributed is up when this returns.

    Raises:
        CheckpointError: the file is unsafe or damaged.
    """
    with open_nemo(cfg.model.restore_from_path) as nemo:
        with open_dict(cfg.model):
            cfg.model.tokenizer = localise_tokenizer(nemo.config, nemo.dir)["tokenizer"]
        model = method.load_model(cfg, ptl_trainer, nemo.dir)
        base = Base(model, load_tokenizer(nemo), read_artifacts(nemo))
    init_distributed(ptl_trainer, model, cfg.model.get("transformer_engine"))
    complete_qk_norm_gradients(model)
    return base


def set_up_optimizer(ptl_trainer: Any, model: Any, loaders: Loaders, num_steps: int) -> tuple[Any, Any]:
    """Optimizer and schedule of the model; weights and both are restored where the run resumes.

    Raises:
        ConfigError: they do not take the settings of the config.
    """
    with open_dict(model.cfg):
        # The cosine must end where training ends, also when the data is shorter than max_steps (reference 7.3).
        if model.cfg.optim.get("sched") is not None:
            model.cfg.optim.sched.setdefault("max_steps", num_steps)
    try:
        init_using_ptl(ptl_trainer, model, loaders.train, loaders.train.dataset)
    except (TypeError, ValueError, OmegaConfBaseException) as err:  # of an optimizer that does not know a setting
        schedule = OmegaConf.select(model.cfg.optim, "sched.name")
        raise ConfigError(
            f"model.optim: NeMo cannot make {model.cfg.optim.name} with {schedule} of these settings: "
            f"{clipped(str(err), 300)}. Take away what it does not know, such as ~model.optim.betas"
        ) from err
    return extract_optimizer_scheduler_from_ptl_model(model)
