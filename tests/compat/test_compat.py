"""The adaptations: complete, loud where upstream moved, absent with CUDA, and numerically what they stand for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from steerlm_nemo.compat.capabilities import PINS, detect
from steerlm_nemo.compat.registry import Adaptation, CompatError

pytest.importorskip("nemo_aligner", reason="needs the training stack: nemo_toolkit, megatron-core, nemo-aligner")


def test_the_installed_stack_is_the_pinned_one() -> None:
    """When a pin moves, every adaptation's `until` is to be read again; then change this table."""
    assert {name: detect().versions[name] for name in PINS} == PINS
    assert PINS == {"nemo_toolkit": "2.3.2", "megatron-core": "0.12.3", "nemo-aligner": "0.7.0"}


def test_a_symbol_that_is_gone_fails_loudly() -> None:
    with pytest.raises(CompatError, match=r"torch:no_such_factory is not there .*\(the reason\)"):
        Adaptation("torch:no_such_factory", "the reason", "never", lambda original: original).apply()
    with pytest.raises(CompatError, match="no_such_module"):
        Adaptation("no_such_module:x", "the reason", "never", lambda original: original).apply()


def test_with_cuda_present_nothing_is_changed() -> None:
    """A process that sees a CUDA device must keep torch and NeMo as they are."""
    program = """
import torch
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda: "pretended"
from steerlm_nemo.compat import cpu, prepare
applied = []
cpu.apply = lambda: applied.append(1)
before = {name: getattr(torch, name) for name in ("tensor", "empty", "zeros", "autocast")}, torch.Tensor.cuda
capabilities = prepare()
after = {name: getattr(torch, name) for name in ("tensor", "empty", "zeros", "autocast")}, torch.Tensor.cuda
assert capabilities.device == "cuda" and capabilities.backend == "nccl", capabilities
assert before == after and not applied
from omegaconf import OmegaConf
from steerlm_nemo.compat.model_config import for_this_machine
asked = OmegaConf.create({"transformer_engine": True, "optim": {"name": "distributed_fused_adam"}})
assert for_this_machine(asked, capabilities) == asked
"""
    env = {"NVIDIA_PYTORCH_VERSION": "24.07", "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stderr[-2000:]


def test_the_optimizer_steps_as_torchs_adamw_does() -> None:
    from steerlm_nemo.compat.optimizer import FusedAdamSemantics

    torch.manual_seed(0)
    start = [torch.randn(7, 5), torch.randn(5)]
    settings = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-8, "weight_decay": 0.1}
    ours = [torch.nn.Parameter(p.clone()) for p in start]
    theirs = [torch.nn.Parameter(p.clone()) for p in start]
    optimizers = FusedAdamSemantics(ours, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(30):
        grads = [torch.randn_like(p) for p in start]
        for params, optimizer in ((ours, optimizers[0]), (theirs, optimizers[1])):
            for parameter, grad in zip(params, grads, strict=True):
                parameter.grad = grad.clone()
            optimizer.step()
    for mine, reference, initial in zip(ours, theirs, start, strict=True):
        assert torch.allclose(mine, reference, atol=1e-6)
        assert not torch.allclose(mine, initial, atol=1e-2)
    assert all(not torch.is_tensor(value) or value.ndim for value in optimizers[0].state[ours[0]].values())


@pytest.mark.parametrize("num_query_groups", [4, 2])
def test_torch_attention_equals_megatrons_local_attention(num_query_groups: int) -> None:
    program = f"""
import torch
from steerlm_nemo.compat import prepare
prepare()
import torch.distributed as dist
dist.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
from megatron.core import parallel_state
parallel_state.initialize_model_parallel()
from megatron.core import tensor_parallel
tensor_parallel.model_parallel_cuda_manual_seed(1)  # mcore forks this generator even without dropout
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from steerlm_nemo.compat.layers import TorchAttention
config = TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups={num_query_groups},
    attention_dropout=0.0, masked_softmax_fusion=False)
torch.manual_seed(0)
q = torch.randn(9, 2, 4, 8); k, v = (torch.randn(9, 2, {num_query_groups}, 8) for _ in range(2))
blocked = torch.ones(1, 1, 9, 9, dtype=torch.bool).triu(1)
ours, theirs = (cls(config, 1, AttnMaskType.causal, "self") for cls in (TorchAttention, DotProductAttention))
expected = theirs(q, k, v, blocked)
assert torch.allclose(ours(q, k, v, None), expected, atol=1e-5)
assert torch.allclose(ours(q[-1:], k, v, None, AttnMaskType.no_mask), expected[-1:], atol=1e-5)
assert not torch.allclose(ours(q[:1], k, v, None, AttnMaskType.no_mask), expected[:1], atol=1e-2)  # sees the future
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
