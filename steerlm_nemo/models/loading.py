"""A `.nemo` as a NeMo model ready to generate, on every rank of a tensor-parallel group."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf, open_dict

from steerlm_nemo.checkpoint.archive import open_nemo
from steerlm_nemo.checkpoint.identity import identity, name_of
from steerlm_nemo.checkpoint.llama_config import SOURCE_KEY, tp_sizes
from steerlm_nemo.checkpoint.tokenizer_files import load_tokenizer, localise_tokenizer
from steerlm_nemo.compat import Capabilities, prepare, quiet_logs
from steerlm_nemo.errors import CheckpointError, ConfigError
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.models.own_template import own_template_of
from steerlm_nemo.own_template.own import OwnTemplate
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

# NeMo's names of precisions, and what they mean for the weights of a model that only generates.
PRECISIONS = {"32": "float32", "16": "float16", "bf16": "bfloat16"}
# A rank waits this long for its partners. Idle time is spent elsewhere (see engine), so this bounds a hang only.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class LoadedModel:
    """A model in eval mode with what its checkpoint says about it."""

    name: str
    nemo_model: Any  # MegatronGPTModel; `.model` is the Megatron Core GPTModel of this rank
    tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer
    config: dict[str, Any]  # model_config.yaml
    format: SteerLMFormat | None
    own_template: OwnTemplate | None  # of a model without a format: a trained one is asked as it was trained
    tp_size: int
    precision: str
    capabilities: Capabilities
    identity: str  # of the checkpoint's content


def undivided(config: Mapping[str, Any], tp_size: int) -> Iterator[str]:
    """What tensor-parallel ranks cannot share evenly, of a model with this config; and which sizes can."""
    shared = {key: config.get(key) or 0 for key in ("num_attention_heads", "num_query_groups", "ffn_hidden_size")}
    sizes = tp_sizes(*shared.values())
    fitting = " or ".join(str(size) for size in sizes if not any(number % size for number in shared.values()))
    undividable = [f"{key} {number}" for key, number in shared.items() if number % tp_size]
    for key in undividable:
        yield f"tensor_model_parallel_size {tp_size} does not divide the checkpoint's {key}; this model takes {fitting}"
    if not undividable and SOURCE_KEY in config and math.lcm(*sizes) % tp_size:  # rows as conversion here pads them
        yield (
            f"tensor_model_parallel_size {tp_size} would give the checkpoint's vocabulary another number of rows than "
            f"it has; this model takes {fitting}"
        )


def check_parallelism(config: Mapping[str, Any], tp_size: int, pp_size: int, num_ranks: int) -> None:
    """Refuse sizes that cannot work, before any rank is started.

    Raises:
        ConfigError: the ranks do not match TP x PP, or TP does not divide the model.
    """
    if pp_size != 1:
        raise ConfigError(
            f"pipeline_model_parallel_size {pp_size}: this server splits a model by tensor parallelism only. Any .nemo "
            f"loads at any size: use pipeline_model_parallel_size=1 tensor_model_parallel_size={tp_size * pp_size}"
        )
    if num_ranks != tp_size:
        raise ConfigError(
            f"trainer.devices x trainer.num_nodes is {num_ranks}, but tensor_model_parallel_size is {tp_size}; "
            f"set trainer.devices={tp_size}"
        )
    for problem in undivided(config, tp_size):
        raise ConfigError(problem)


def load_for_inference(path: str | Path, tensor_model_parallel_size: int = 1, precision: str = "32") -> LoadedModel:
    """Load a `.nemo` on this rank; torch.distributed is up when this returns.

    Called by every rank of the job (see `ranks`); alone, it is a job of one rank.

    Raises:
        CheckpointError: the file is unsafe, damaged or not a GPT of Megatron Core.
        ConfigError: an unknown precision.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision {precision!r}: use one of {', '.join(PRECISIONS)}")
    capabilities = prepare()
    quiet_logs(verbose=False)
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
    from nemo.collections.nlp.parts.nlp_overrides import NLPSaveRestoreConnector

    from steerlm_nemo.compat.model_config import for_this_machine

    with open_nemo(path) as nemo:
        config = OmegaConf.create(localise_tokenizer(nemo.config, nemo.dir))
        if not config.get("mcore_gpt"):
            raise CheckpointError(f"{path}: mcore_gpt is not true; only Megatron Core GPT checkpoints can be served")
        with open_dict(config):
            # A fine-tuned model generates as a plain GPT; its training class would ask for its training data.
            for key in ("target", "data", "restore_from_path"):
                config.pop(key, None)
            config.tensor_model_parallel_size = tensor_model_parallel_size
            config.pipeline_model_parallel_size = 1
            config.sequence_parallel = False
            config.activations_checkpoint_granularity = None
            config.activations_checkpoint_method = None
            config.micro_batch_size = config.global_batch_size = 1
            config.precision = precision
            config.megatron_amp_O2 = precision == "bf16"  # weights in bf16; NeMo serves fp16 through autocast
            config.gradient_as_bucket_view = False
            config.optim = {"name": "fused_adam"}
        config = for_this_machine(config, capabilities)
        trainer_config = {
            "devices": int(os.environ.get("LOCAL_WORLD_SIZE", tensor_model_parallel_size)),
            "num_nodes": int(os.environ.get("SLURM_NNODES", "1")),
            "accelerator": "gpu" if capabilities.device == "cuda" else "cpu",
            "precision": precision,
            "logger": False,
            "enable_checkpointing": False,
            "use_distributed_sampler": False,
        }
        trainer = MegatronTrainerBuilder(
            OmegaConf.create({"trainer": trainer_config, "exp_manager": None, "model": config})
        ).create_trainer(callbacks=[])
        trainer.strategy._timeout = COLLECTIVE_TIMEOUT
        connector = NLPSaveRestoreConnector()
        connector.model_extracted_dir = str(nemo.dir)
        model = MegatronGPTModel.restore_from(
            restore_path=str(nemo.dir),
            trainer=trainer,
            override_config_path=config,
            save_restore_connector=connector,
            strict=True,
        )
        tokenizer = load_tokenizer(nemo)
        served = SteerLMFormat.of_config(nemo.config)
        loaded = LoadedModel(
            name=name_of(nemo),
            nemo_model=model,
            tokenizer=tokenizer,
            config=nemo.config,
            format=served,
            own_template=None if served else own_template_of(nemo, tokenizer),
            tp_size=tensor_model_parallel_size,
            precision=precision,
            capabilities=capabilities,
            identity=identity(nemo),
        )
    model.freeze()
    if capabilities.device == "cuda":
        model.cuda()
    return loaded
