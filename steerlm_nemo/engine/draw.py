"""Choosing the next tokens of many rows at once.

N rows, V real vocabulary entries (the padding of the vocabulary is cut off before).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steerlm_nemo.engine.protocol import Sample

# Below, everything but the likeliest token is at probability 0 in fp32 anyway.
_MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class Rule:
    """A setting of a sample that changes the logits of its row before they are tempered."""

    setting: str  # of `Sample`
    off: Any  # the value with which it does nothing
    apply: Callable[[torch.Tensor, Any, Sequence[int], int], None]  # (logits_V in place, value, tokens, of the prompt)


def _add_bias(logits_V: torch.Tensor, bias: Sequence[tuple[int, float]], token_ids: Sequence[int], num: int) -> None:
    ids, values = zip(*bias, strict=True)
    logits_V[torch.tensor(ids, device=logits_V.device)] += torch.tensor(values, device=logits_V.device)


def _penalise_repetition(logits_V: torch.Tensor, penalty: float, token_ids: Sequence[int], num: int) -> None:
    """Make ids that occurred less likely (CTRL, arXiv:1909.05858), whatever the sign of their logit."""
    used = torch.tensor(sorted(set(token_ids)), device=logits_V.device)
    scores = logits_V[used]
    logits_V[used] = torch.where(scores > 0, scores / penalty, scores * penalty)


def _penalise_frequency(logits_V: torch.Tensor, penalty: float, token_ids: Sequence[int], num: int) -> None:
    """OpenAI's: so much less for every time that a token was generated."""
    if counts := Counter(token_ids[num:]):
        made = torch.tensor(list(counts), device=logits_V.device)
        logits_V[made] -= penalty * torch.tensor(list(counts.values()), device=logits_V.device)


def _penalise_presence(logits_V: torch.Tensor, penalty: float, token_ids: Sequence[int], num: int) -> None:
    """OpenAI's: so much less for a token that was generated at all."""
    if made := sorted(set(token_ids[num:])):
        logits_V[torch.tensor(made, device=logits_V.device)] -= penalty


RULES = (  # in this order
    Rule("logit_bias", (), _add_bias),
    Rule("repetition_penalty", 1.0, _penalise_repetition),
    Rule("frequency_penalty", 0.0, _penalise_frequency),
    Rule("presence_penalty", 0.0, _penalise_presence),
)


def drawn_tokens(
    logits_NV: torch.Tensor, samples: Sequence[Sample], used: Sequence[Sequence[int]], chances: Sequence[float]
) -> tuple[list[int], list[bool]]:
    """A token drawn for each row, and whether its probabilities are numbers at all. `logits_NV` may be changed.

    `used` are each row's tokens so far, the prompt's first; `chances` one number in [0, 1) per row, from the row's own
    generator, decides: what a row draws does not depend on its neighbours.
    """
    device = logits_NV.device
    for row, (sample, ids) in enumerate(zip(samples, used, strict=True)):
        for rule in RULES:
            if (value := getattr(sample, rule.setting)) != rule.off:
                rule.apply(logits_NV[row], value, ids, len(sample.prompt_ids))
    temperature = torch.tensor([max(sample.temperature, _MIN_TEMPERATURE) for sample in samples], device=device)
    logits = logits_NV / temperature[:, None]
    vocab_size = logits.shape[1]
    limits = [sample.top_k or vocab_size for sample in samples]
    ordered, order = logits.topk(min(max(limits), vocab_size))  # best first
    rank = torch.arange(ordered.shape[1], device=device)
    ordered = ordered.masked_fill(rank >= torch.tensor(limits, device=device)[:, None], -torch.inf)
    least = torch.tensor([sample.min_p for sample in samples], device=device).log()  # of the likeliest, as a share
    ordered = ordered.masked_fill(ordered < ordered[:, :1] + least[:, None], -torch.inf)
    probs = ordered.softmax(-1)
    top_p = torch.tensor([sample.top_p if 0.0 < sample.top_p < 1.0 else 2.0 for sample in samples], device=device)
    before = probs.cumsum(-1) - probs
    probs = probs.masked_fill(before > top_p[:, None], 0.0)  # the token that crosses the threshold stays
    until = probs.double().cumsum(-1)
    point = torch.tensor(chances, dtype=torch.float64, device=device) * until[:, -1]
    picked = (until <= point[:, None]).sum(-1).clamp(max=probs.shape[1] - 1)
    return order.gather(1, picked[:, None])[:, 0].tolist(), until[:, -1].isfinite().tolist()
