"""The Engine protocol on a Hugging Face causal model, each row by itself: the outside reference for serving tests."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from transformers import DynamicCache, LlamaForCausalLM

from steerlm_nemo.engine.protocol import (
    Choice,
    Completion,
    EngineCounters,
    Event,
    Failed,
    Finished,
    ModelInfo,
    Sample,
    Scored,
    ScoreRequest,
    Scores,
    TokenMade,
)
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.own_template.own import OwnTemplate
from steerlm_nemo.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer


class HFEngine:
    """Greedy and sampled generation with a key-value cache, and spans scored by a forward pass each; rows never see one
    another."""

    def __init__(
        self,
        model: LlamaForCausalLM,
        tokenizer: SentencePieceTokenizer | HuggingFaceTokenizer,
        served: SteerLMFormat | None,
        name: str,
        own_template: OwnTemplate | None = None,
    ) -> None:
        self.model = model.eval()
        self.calls: list[int] = []  # rows that began together
        self.counters = EngineCounters()
        self._num_rows = 0
        self._rows: dict[int, Generator[TokenMade, None, Completion] | ScoreRequest] = {}
        self._num_new = 0
        self.info = ModelInfo(
            name=name,
            tokenizer=tokenizer,
            vocab_size=tokenizer.vocab_size,
            context_length=model.config.max_position_embeddings,
            format=served,
            report={"tp_size": 1, "dtype": "float32"},
            own_template=own_template,
        )

    @classmethod
    def load(cls, folder: Path, served: SteerLMFormat | None = None) -> HFEngine:
        model = LlamaForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
        return cls(model, SentencePieceTokenizer(folder / "tokenizer.model"), served, folder.name)

    def add(self, work: Sample | ScoreRequest) -> int:
        self._num_rows += 1
        self._num_new += 1
        self._rows[self._num_rows] = work if isinstance(work, ScoreRequest) else self._continue(self._num_rows, work)
        return self._num_rows

    def cancel(self, row: int) -> None:
        self._rows.pop(row, None)

    def step(self) -> list[Event]:
        """One token for every row, or all of a row's scores."""
        if self._num_new:
            self.calls.append(self._num_new)
            self._num_new = 0
        events: list[Event] = []
        for row, tokens in list(self._rows.items()):
            try:
                with torch.no_grad():
                    if not isinstance(tokens, ScoreRequest):
                        events.append(next(tokens))
                        continue
                    events.append(Scored(row, self._scores(tokens)))
            except StopIteration as end:
                events.append(Finished(row, end.value))
            except Exception as err:
                events.append(Failed(row, err))
            del self._rows[row]
        return events

    def _continue(self, row: int, sample: Sample) -> Generator[TokenMade, None, Completion]:
        ids = list(sample.prompt_ids)
        cache = DynamicCache()
        chance = torch.Generator()
        chance.seed() if sample.random_seed is None else chance.manual_seed(sample.random_seed)
        pending = ids
        log_probs: list[torch.Tensor] = []  # row t: distribution of token t+1
        finish_reason, num_overruled = "length", 0
        self.counters.prefilled_tokens += len(ids)
        if not sample.tokens_to_generate:
            log_probs = list(self.model(torch.tensor([ids])).logits[0, :, : self.info.vocab_size].log_softmax(-1))
        for step in range(sample.tokens_to_generate):
            logits = self.model(torch.tensor([pending]), past_key_values=cache).logits[0, :, : self.info.vocab_size]
            log_probs += list(logits.log_softmax(-1))
            last = logits[-1].clone()
            is_early = step < sample.min_tokens_to_generate
            if is_early:
                last[list(sample.stop_ids) if sample.stops_wait else [self.info.tokenizer.eos_id]] = -torch.inf
            if not sample.greedy:
                _apply_rules(last, sample, ids)
            token = int(last.argmax()) if sample.greedy else _draw(last, sample, chance)
            if sample.constraint:
                allowed = _allowed(sample, ids[len(sample.prompt_ids) :])
                if allowed is None:
                    finish_reason = "stop"
                    break
                num_overruled += len(allowed) > 1 and token not in allowed
                token = max(sorted(allowed), key=lambda candidate: float(last[candidate]))
            ids.append(token)
            self.counters.generated_tokens += 1
            score = float(log_probs[-1][token]) if sample.token_logprobs else None
            top = _top(log_probs[-1:], sample.top_logprobs)[0] if sample.top_logprobs else ()
            pending = [token]
            first = len(sample.prompt_ids) + (sample.min_tokens_to_generate if sample.stops_wait else 0)
            made = self.info.tokenizer.decode(ids[first:])
            if not (sample.stops_wait and len(ids) <= first) and (
                token in sample.stop_ids
                or self.info.tokenizer.decode(ids).endswith(sample.stop_texts)
                or any(stop in made for stop in sample.stop_anywhere)
            ):
                finish_reason = "stop"
            is_last = finish_reason == "stop" or step == sample.tokens_to_generate - 1
            yield TokenMade(row, token, score, top, finish_reason if is_last else None)
            if is_last:
                break
        rows = torch.stack(log_probs)[: len(ids) - 1]
        num_prompt = len(sample.prompt_ids)
        chosen = tuple(rows.gather(1, torch.tensor(ids[1:], dtype=torch.int64)[:, None])[:, 0].tolist())
        told = 0 if sample.prompt_logprobs else num_prompt - 1
        return Completion(
            tuple(ids),
            num_prompt,
            finish_reason,
            chosen if sample.compute_logprob else None,
            rows.tolist() if sample.all_probs else None,
            num_overruled,
            chosen[told:] if sample.token_logprobs else None,
            _top(rows[told:], sample.top_logprobs) if sample.top_logprobs else None,
            self._choices(sample, ids),
        )

    def _scores(self, request: ScoreRequest) -> Scores:
        found = []
        for span in request.spans:
            ids = torch.tensor([request.prompt_ids + span])
            logits = self.model(ids).logits[0, -len(span) - 1 : -1, : self.info.vocab_size]
            found.append(tuple(logits.log_softmax(-1).gather(1, ids[0, -len(span) :, None])[:, 0].tolist()))
        return Scores(tuple(found))

    def _choices(self, sample: Sample, ids: list[int]) -> tuple[Choice, ...]:
        """Every option read by a forward pass of its own, up to where it differs from all others."""
        choices = []
        place = len(sample.prompt_ids)
        for options in sample.constraint:
            taken = next(option for option in options if tuple(ids[place : place + len(option)]) == option)
            if len(options) > 1:
                logprobs = []
                for option in options:
                    shared = max(_num_shared(option, other) for other in options if other != option)
                    told_apart = option[: shared + 1]
                    logits = self.model(torch.tensor([ids[:place] + list(told_apart)])).logits[0, place - 1 : -1]
                    scores = logits[:, : self.info.vocab_size].log_softmax(-1)
                    logprobs.append(float(sum(scores[i, token] for i, token in enumerate(told_apart))))
                choices.append(Choice(options.index(taken), tuple(logprobs)))
            place += len(taken)
        return tuple(choices)


def _num_shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _top(log_probs: Sequence[torch.Tensor], count: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    best = [row.topk(count) for row in log_probs]
    return tuple(tuple(zip(row.indices.tolist(), row.values.tolist(), strict=True)) for row in best)


def _allowed(sample: Sample, generated: list[int]) -> set[int] | None:
    """Next tokens by matching what was generated against the steps from the start; None when they are all done."""
    rest = tuple(generated)
    for options in sample.constraint:
        for option in options:
            if rest[: len(option)] == option:
                rest = rest[len(option) :]
                break
        else:
            return {option[len(rest)] for option in options if option[: len(rest)] == rest}
    return None


def _apply_rules(logits: torch.Tensor, sample: Sample, ids: list[int]) -> None:
    for token, bias in sample.logit_bias:
        logits[token] += bias
    for token in set(ids):
        logits[token] *= sample.repetition_penalty if logits[token] < 0 else 1 / sample.repetition_penalty
    generated = ids[len(sample.prompt_ids) :]
    for token in set(generated):
        logits[token] -= sample.frequency_penalty * generated.count(token) + sample.presence_penalty


def _draw(logits: torch.Tensor, sample: Sample, chance: torch.Generator) -> int:
    probs = (logits / sample.temperature).softmax(-1)
    ordered, order = probs.sort(descending=True)
    ordered[ordered < sample.min_p * ordered[0]] = 0
    if sample.top_k:
        ordered[sample.top_k :] = 0
    if 0 < sample.top_p < 1:
        ordered[(ordered.cumsum(0) - ordered) > sample.top_p] = 0
    return int(order[torch.multinomial(ordered, 1, generator=chance)])
