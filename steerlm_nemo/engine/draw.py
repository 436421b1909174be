"""Choosing the next tokens of many rows at once.

N rows, V real vocabulary entries (the padding of the vocabulary is cut off before).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steerlm_nemo.engine.protocol import Sample

# Below, everything but the likeliest token is at probability 0 in fp32 anyway.
_MIN_TEMPERATURE = 1e-6


def drawn_tokens(
    logits_NV: torch.Tensor, samples: Sequence[Sample], used: Sequence[Sequence[int]], chances: Sequence[float]
) -> tuple[list[int], list[bool]]:
    """A token drawn for each row, and whether its probabilities are numbers at all.

    `used` are each row's tokens so far (repetition penalty); `chances` one number in [0, 1) per row, from the row's own
    generator, decides: what a row draws does not depend on its neighbours.
    """
    device = logits_NV.device
    temperature = torch.tensor([max(sample.temperature, _MIN_TEMPERATURE) for sample in samples], device=device)
    logits = logits_NV / temperature[:, None]
    for row, (sample, ids) in enumerate(zip(samples, used, strict=True)):
        if sample.repetition_penalty != 1.0:
            _penalise_repetition(logits[row], ids, sample.repetition_penalty)
    vocab_size = logits.shape[1]
    limits = [sample.top_k or vocab_size for sample in samples]
    ordered, order = logits.topk(min(max(limits), vocab_size))  # best first
    rank = torch.arange(ordered.shape[1], device=device)
    ordered = ordered.masked_fill(rank >= torch.tensor(limits, device=device)[:, None], -torch.inf)
    probs = ordered.softmax(-1)
    top_p = torch.tensor([sample.top_p if 0.0 < sample.top_p < 1.0 else 2.0 for sample in samples], device=device)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before > top_p[:, None], 0.0)  # the token that crosses the threshold stays
    until = probs.double().cumsum(-1)
    point = torch.tensor(chances, dtype=torch.float64, device=device) * until[:, -1]
    picked = (until <= point[:, None]).sum(-1).clamp(max=probs.shape[1] - 1)
    return order.gather(1, picked[:, None])[:, 0].tolist(), until[:, -1].isfinite().tolist()


def _penalise_repetition(logits_V: torch.Tensor, token_ids: Sequence[int], penalty: float) -> None:
    """Make ids that occurred less likely (CTRL, arXiv:1909.05858), whatever the sign of their logit. In place."""
    used = torch.tensor(sorted(set(token_ids)), device=logits_V.device)
    scores = logits_V[used]
    logits_V[used] = torch.where(scores > 0, scores / penalty, scores * penalty)
