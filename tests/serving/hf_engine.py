"""The Engine protocol on a Hugging Face causal model, one row at a time: the outside reference for serving tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import DynamicCache, LlamaForCausalLM

from steerlm_nemo.serving.sampling import Completion, ModelInfo, Sample
from steerlm_nemo.template import SteerLMFormat
from steerlm_nemo.tokenizer import SentencePieceTokenizer


class HFEngine:
    """Greedy and sampled generation with a key-value cache; rows never see one another."""

    def __init__(
        self, model: LlamaForCausalLM, tokenizer: SentencePieceTokenizer, served: SteerLMFormat | None, name: str
    ) -> None:
        self.model = model.eval()
        self.calls: list[int] = []  # rows of each call
        self.info = ModelInfo(
            name=name,
            tokenizer=tokenizer,
            vocab_size=tokenizer.vocab_size,
            context_length=model.config.max_position_embeddings,
            format=served,
            report={"tp_size": 1, "dtype": "float32"},
        )

    @classmethod
    def load(cls, folder: Path, served: SteerLMFormat | None = None) -> HFEngine:
        model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
        return cls(model, SentencePieceTokenizer(folder / "tokenizer.model"), served, folder.name)

    def generate(self, samples: Sequence[Sample]) -> list[Completion]:
        self.calls.append(len(samples))
        with torch.no_grad():
            return [self._continue(sample) for sample in samples]

    def _continue(self, sample: Sample) -> Completion:
        ids = list(sample.prompt_ids)
        cache = DynamicCache()
        chance = torch.Generator().manual_seed(sample.random_seed or 0)
        pending = ids
        log_probs: list[torch.Tensor] = []  # row t: distribution of token t+1
        finish_reason, num_overruled = "length", 0
        for step in range(sample.tokens_to_generate):
            logits = self.model(torch.tensor([pending]), past_key_values=cache).logits[0, :, : self.info.vocab_size]
            log_probs += list(logits.log_softmax(-1))
            last = logits[-1].clone()
            if step < sample.min_tokens_to_generate:
                last[self.info.tokenizer.eos_id] = -torch.inf
            token = int(last.argmax()) if sample.greedy else _draw(last, sample, chance)
            if sample.constraint:
                allowed = _allowed(sample, ids[len(sample.prompt_ids) :])
                if allowed is None:
                    finish_reason = "stop"
                    log_probs = log_probs[:-1] if len(log_probs) > len(ids) else log_probs
                    break
                num_overruled += allowed.num_options > 1 and token not in allowed.tokens
                token = max(allowed.tokens, key=lambda candidate: float(last[candidate]))
            ids.append(token)
            pending = [token]
            if token in sample.stop_ids or (
                sample.stop_texts and self.info.tokenizer.decode(ids).endswith(sample.stop_texts)
            ):
                finish_reason = "stop"
                break
        rows = torch.stack(log_probs)[: len(ids) - 1]
        return Completion(
            tuple(ids),
            len(sample.prompt_ids),
            finish_reason,
            tuple(rows.gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()) if sample.compute_logprob else None,
            rows.tolist() if sample.all_probs else None,
            num_overruled,
        )


class _Allowed(NamedTuple):
    tokens: set[int]
    num_options: int


def _allowed(sample: Sample, generated: list[int]) -> _Allowed | None:
    """Next tokens by matching what was generated against the steps from the start; None when they are all done."""
    rest = tuple(generated)
    for options in sample.constraint:
        for option in options:
            if rest[: len(option)] == option:
                rest = rest[len(option) :]
                break
        else:
            return _Allowed({option[len(rest)] for option in options if option[: len(rest)] == rest}, len(options))
    return None


def _draw(logits: torch.Tensor, sample: Sample, chance: torch.Generator) -> int:
    probs = (logits / sample.temperature).softmax(-1)
    ordered, order = probs.sort(descending=True)
    if sample.top_k:
        ordered[sample.top_k :] = 0
    if 0 < sample.top_p < 1:
        ordered[(ordered.cumsum(0) - ordered) > sample.top_p] = 0
    return int(order[torch.multinomial(ordered, 1, generator=chance)])
