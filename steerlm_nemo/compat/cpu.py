"""Adaptations that let NeMo 2.3.2, NeMo-Aligner 0.7.0 and Megatron Core 0.12.3 run on a CPU over gloo.

Applied after NeMo is imported: its `torch.jit.script` functions compile at import and refuse replaced factories.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from steerlm_nemo.compat.registry import Adaptation

_NO_CUDA = "the stack names CUDA devices literally"
_NO_APEX = "defined only where Apex is installed"
_UNTIL_DEVICE = "upstream asks for the current accelerator instead of cuda"
_UNTIL_APEX = "upstream no longer needs Apex"


def apply() -> None:
    """Put every adaptation in place."""
    for adaptation in (*_cuda_calls(), *_factories(), *_apex_gates(), *_layers(), *_checkpoints()):
        adaptation.apply()
    _register_optimizer()


# --- device calls -----------------------------------------------------------------------------------------------


def _cpu_device(device: Any) -> Any:
    """The CPU for any spelling of a CUDA device; every other argument unchanged."""
    if isinstance(device, str) and device.startswith("cuda"):
        return "cpu"
    if isinstance(device, torch.device) and device.type == "cuda":
        return torch.device("cpu")
    return device


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    # A new function object per name: dynamo's tables refuse one object under several names.
    @functools.wraps(factory)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _cpu_device(kwargs["device"])
        return factory(*args, **kwargs)

    return call


def _factories() -> Iterator[Adaptation]:
    for name in (
        *("tensor", "as_tensor", "empty", "zeros", "ones", "full", "arange", "rand", "randn", "randint", "eye"),
        *("empty_like", "zeros_like", "ones_like", "linspace", "tril", "triu"),
    ):
        yield Adaptation(f"torch:{name}", _NO_CUDA, _UNTIL_DEVICE, _on_cpu)
    yield Adaptation("torch:Tensor.new_zeros", _NO_CUDA, _UNTIL_DEVICE, _on_cpu)
    yield Adaptation("torch:Tensor.new_empty", _NO_CUDA, _UNTIL_DEVICE, _on_cpu)
    yield Adaptation("torch:autocast", _NO_CUDA, _UNTIL_DEVICE, _autocast_on_cpu)


def _autocast_on_cpu(original: type[torch.autocast]) -> type[torch.autocast]:
    class autocast(original):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str = "cuda", *args: Any, **kwargs: Any) -> None:
            super().__init__(_cpu_device(device_type), *args, **kwargs)

    return autocast


class _NoStream:
    """Stands for a CUDA stream or event: work on a CPU is already in order."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def _returns(value: Any) -> Callable[[Any], Any]:
    def make(original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            return value

        return call

    return make


def _cuda_calls() -> Iterator[Adaptation]:
    def adapt(name: str, make: Callable[[Any], Any]) -> Adaptation:
        return Adaptation(f"torch:{name}", _NO_CUDA, _UNTIL_DEVICE, make)

    cpu = torch.device("cpu")
    yield adapt("cuda.current_device", _returns(cpu))
    for name in ("synchronize", "empty_cache", "set_device", "reset_peak_memory_stats"):
        yield adapt(f"cuda.{name}", _returns(None))
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        yield adapt(f"cuda.{name}", _returns(0))
    yield adapt("cuda.Stream", lambda original: _NoStream)
    yield adapt("cuda.Event", lambda original: _NoStream)
    yield adapt("cuda.current_stream", lambda original: lambda *a, **k: _NoStream())
    yield adapt("cuda.stream", lambda original: lambda *a, **k: contextlib.nullcontext())
    yield adapt("cuda.manual_seed", lambda original: lambda seed: torch.manual_seed(seed) and None)
    yield adapt("cuda.get_rng_state", lambda original: lambda *a, **k: torch.get_rng_state())
    yield adapt("cuda.set_rng_state", lambda original: lambda state, *a, **k: torch.set_rng_state(state))
    for name, dtype in (
        *(("LongTensor", torch.long), ("IntTensor", torch.int), ("FloatTensor", torch.float)),
        *(("BoolTensor", torch.bool), ("ByteTensor", torch.uint8)),
    ):
        yield adapt(f"cuda.{name}", functools.partial(_typed_tensor, dtype))
    yield adapt("Tensor.cuda", lambda original: lambda tensor, *a, **k: tensor)
    yield adapt("nn.Module.cuda", lambda original: lambda module, *a, **k: module)
    yield adapt("Tensor.pin_memory", lambda original: lambda tensor, *a, **k: tensor)
    yield adapt("Tensor.to", _to_on_cpu)
    yield adapt("distributed.barrier", _barrier_without_devices)
    for symbol in (
        "nemo.core.classes.modelPT:ModelPT.cuda",
        "lightning.fabric.utilities.device_dtype_mixin:_DeviceDtypeModuleMixin.cuda",
    ):
        yield Adaptation(symbol, _NO_CUDA, _UNTIL_DEVICE, lambda original: lambda module, *a, **k: module)
    yield adapt("nn.Parameter.type", _cuda_type_name)
    for function in ("LinearWithGradAccumulationAndAsyncCommunication", "LinearWithFrozenWeight"):
        for method, wrap in (("forward", torch.amp.custom_fwd), ("backward", torch.amp.custom_bwd)):
            yield Adaptation(
                f"megatron.core.tensor_parallel.layers:{function}.{method}",
                "its autocast decorators watch the CUDA autocast state: the backward pass mixes dtypes on a CPU",
                _UNTIL_DEVICE,
                functools.partial(_autocast_aware, wrap),
            )
    yield Adaptation(
        "nemo.collections.nlp.modules.common.megatron.megatron_init:_set_random_seed",
        "seeds Megatron's generators only where a CUDA device is counted; dropout and sequence parallelism need them",
        _UNTIL_DEVICE,
        _seed_megatron_too,
    )
    rng = "megatron.core.tensor_parallel.random"
    yield Adaptation(
        f"{rng}:_get_cuda_rng_state",
        "reads a CUDA generator",
        _UNTIL_DEVICE,
        lambda original: lambda *a, **k: torch.get_rng_state(),
    )
    yield Adaptation(
        f"{rng}:_set_cuda_rng_state",
        "writes a CUDA generator",
        _UNTIL_DEVICE,
        lambda original: lambda state, *a, **k: torch.set_rng_state(state),
    )


def _seed_megatron_too(original: Callable[[int], None]) -> Callable[[int], None]:
    def set_random_seed(seed: int) -> None:
        from megatron.core import tensor_parallel
        from nemo.collections.nlp.modules.common.megatron.megatron_init import get_pipeline_model_parallel_rank

        original(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed + 100 * get_pipeline_model_parallel_rank())

    return set_random_seed


def _cuda_type_name(original: Callable[..., Any]) -> Callable[..., Any]:
    def type_name(parameter: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        # NeMo's fp32 master weights sort parameters by the names of CUDA tensor types.
        result = original(parameter, *args, **kwargs)
        return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result

    return type_name


def _autocast_aware(wrap: Callable[..., Any], original: Any) -> staticmethod[..., Any]:
    return staticmethod(wrap(original.__wrapped__, device_type="cpu"))


def _typed_tensor(dtype: torch.dtype, original: Any) -> Any:
    class _Meta(type):
        def __instancecheck__(cls, instance: Any) -> bool:
            return isinstance(instance, torch.Tensor) and instance.dtype == dtype

    class TypedTensor(metaclass=_Meta):
        def __new__(cls, data: Any) -> torch.Tensor:  # type: ignore[misc]
            return torch.tensor(data, dtype=dtype)

    return TypedTensor


def _to_on_cpu(original: Callable[..., Any]) -> Callable[..., Any]:
    def to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _cpu_device(kwargs["device"])
        return original(tensor, *(_cpu_device(arg) for arg in args), **kwargs)

    return to


def _barrier_without_devices(original: Callable[..., Any]) -> Callable[..., Any]:
    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None) -> Any:
        return original(group=group, async_op=async_op)  # gloo refuses device_ids

    return barrier


# --- Apex -------------------------------------------------------------------------------------------------------


def _apex_gates() -> Iterator[Adaptation]:
    def adapt(symbol: str, value: Any, may_be_missing: bool = True) -> Adaptation:
        return Adaptation(symbol, _NO_APEX, _UNTIL_APEX, lambda original: value, may_be_missing)

    import torch.nn as nn
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
    from megatron.core.utils import (
        local_multi_tensor_applier,
        local_multi_tensor_l2_norm,
        local_multi_tensor_scale,
    )
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    overrides = "nemo.collections.nlp.parts.nlp_overrides"
    yield adapt(f"{overrides}:HAVE_APEX", True, may_be_missing=False)
    yield adapt(f"{overrides}:McoreDistributedOptimizer", McoreDistributedOptimizer)
    # Only ever used in isinstance checks of optimizers that cannot exist here.
    yield adapt(f"{overrides}:MegatronDistributedFusedAdam", type("MegatronDistributedFusedAdam", (), {}))
    yield adapt(
        "nemo.collections.nlp.modules.common.megatron.build_model:set_defaults_if_not_set_tensor_model_parallel_attributes",
        set_defaults_if_not_set_tensor_model_parallel_attributes,
    )
    yield Adaptation(
        "nemo.collections.nlp.models.nlp_model:get_megatron_pretrained_bert_models",
        "listing NeMo's BERT models imports a spec that needs Transformer Engine or Apex; no BERT is used here",
        _UNTIL_APEX,
        lambda original: lambda: [],
    )
    utils = "nemo.collections.nlp.modules.common.megatron.utils"
    yield adapt(f"{utils}:listify_model", lambda model: model if isinstance(model, list) else [model])
    for name in ("FusedLayerNorm", "FastLayerNorm"):
        yield adapt(f"{utils}:{name}", nn.LayerNorm)
    yield adapt(f"{utils}:MixedFusedRMSNorm", nn.RMSNorm)

    class amp_C:
        multi_tensor_scale = staticmethod(local_multi_tensor_scale)
        multi_tensor_l2norm = staticmethod(local_multi_tensor_l2_norm)

    for module in (
        "nemo.collections.nlp.modules.common.megatron.clip_grads",
        "nemo.core.optim.optimizer_with_main_params",
    ):
        yield adapt(f"{module}:HAVE_APEX", True, may_be_missing=False)
        yield adapt(f"{module}:multi_tensor_applier", local_multi_tensor_applier)
        yield adapt(f"{module}:amp_C", amp_C)


# --- layers -----------------------------------------------------------------------------------------------------


def _layers() -> Iterator[Adaptation]:
    from steerlm_nemo.compat.layers import TorchNorm, cpu_layer_spec

    model = "nemo.collections.nlp.models.language_modeling.megatron_gpt_model"
    yield Adaptation(
        f"{model}:get_specs",
        "imports the Gemma 2 spec, which needs Transformer Engine; and no spec with Transformer Engine can run here",
        "get_specs imports each spec only when asked for it",
        lambda original: lambda spec_name, config, *args: cpu_layer_spec(config.qk_layernorm),
    )
    yield Adaptation(
        "megatron.core.transformer.transformer_block:LayerNormImpl",
        "mcore's torch norm, used after the last layer, refuses sequence parallelism",
        "megatron-core's WrappedTorchNorm marks its weight as sequence parallel",
        lambda original: TorchNorm,
    )


# --- checkpoints ------------------------------------------------------------------------------------------------


def _checkpoints() -> Iterator[Adaptation]:
    yield Adaptation(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:_write_item",
        "torch 2.7 added a serialization format argument that Megatron Core 0.12 does not pass",
        "megatron-core passes serialization_format itself (0.13)",
        _with_serialization_format,
    )


def _with_serialization_format(original: Callable[..., Any]) -> Callable[..., Any]:
    from torch.distributed.checkpoint.filesystem import SerializationFormat

    def write_item(*args: Any) -> Any:
        return original(*args, serialization_format=SerializationFormat.TORCH_SAVE)

    return write_item


# --- optimizers -------------------------------------------------------------------------------------------------


def _register_optimizer() -> None:
    """NeMo's own registry, under the name `model_config.CPU_OPTIMIZER`: Apex's Adams refuse CPU tensors."""
    from nemo.core.config.optimizers import AdamWParams
    from nemo.core.optim.optimizers import register_optimizer

    from steerlm_nemo.compat.model_config import CPU_OPTIMIZER
    from steerlm_nemo.compat.optimizer import FusedAdamSemantics

    register_optimizer(CPU_OPTIMIZER, FusedAdamSemantics, AdamWParams)
