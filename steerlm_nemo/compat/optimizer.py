"""An AdamW with the semantics of Apex's FusedAdam, for machines where Apex's cannot run.

Same update rule (decoupled weight decay). The step count lives in the parameter group, as in FusedAdam: torch's
per-parameter 0-dimensional `step` tensors cannot be sharded into a Megatron distributed checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class FusedAdamSemantics(torch.optim.AdamW):
    """Subclass of `torch.optim.AdamW`, because NeMo pre-creates the states of that class when it loads."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **ignored: Any,  # bucket sizes, overlap flags, grad_sync_dtype: they tune communication Apex's class does
    ) -> None:
        super().__init__(params, lr=lr, betas=(betas[0], betas[1]), eps=eps, weight_decay=weight_decay)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # AdamW's own would put a 0-dimensional `step` into every parameter's state.
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = closure() if closure is not None else None
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["exp_avg"] = torch.zeros_like(p, dtype=torch.float32)
                    self.state[p]["exp_avg_sq"] = torch.zeros_like(p, dtype=torch.float32)
            beta1, beta2 = group["betas"]
            grads = [p.grad.float() for p in params]
            averages = [self.state[p]["exp_avg"] for p in params]
            squares = [self.state[p]["exp_avg_sq"] for p in params]
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
            torch._foreach_lerp_(averages, grads, 1 - beta1)
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)
            denominators = torch._foreach_sqrt(squares)
            torch._foreach_div_(denominators, (1 - beta2 ** group["step"]) ** 0.5)
            torch._foreach_add_(denominators, group["eps"])
            torch._foreach_addcdiv_(params, averages, denominators, value=-group["lr"] / (1 - beta1 ** group["step"]))
        return loss
