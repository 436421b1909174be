"""The Megatron engine: continues batches of prompts with a KV cache, on all ranks of a tensor-parallel group.

Rank 0 takes the calls. It sends each batch to the others as JSON (no pickle), and then every rank runs the same
loop; rank 0 draws the tokens and sends them around, so that ranks cannot drift apart.

Decoding follows NeMo's `sample_sequence_batch`: prefill up to the shortest prompt, then one position at a time, rows
still inside their prompt being fed from it. Different from it: every row has its own limit (D-16), the repetition
penalty works and knows signs (D-17), full log-probabilities need no other flag (D-15).
B rows, V vocabulary.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from steerlm_nemo.serving.loading import LoadedModel
from steerlm_nemo.serving.sampling import Completion, ModelInfo, Sample

logger = logging.getLogger("steerlm_nemo.serving")

# Rows of one batch differ in prompt length by at most this much: each position between the shortest and the longest
# prompt is a decoding step of its own.
MAX_LENGTH_SPREAD = 16
MAX_ROWS = 128
_FAILED = -1  # no token id
EXIT_RANK_FAILED = 70
_IDLE_TIMEOUT = timedelta(days=365)  # followers wait for work without limit; a dead rank 0 closes their connection


class DrawError(RuntimeError):
    """No token could be drawn for a batch; every rank raises it at the same place."""


class MegatronEngine:
    """`serving.sampling.Engine` on a loaded model. Create it on every rank; call `generate` on rank 0 only."""

    def __init__(self, loaded: LoadedModel, name: str) -> None:
        self._loaded = loaded
        self._model = loaded.nemo_model.model
        self._device = next(self._model.parameters()).device
        # A gloo group of its own: waiting for work must neither time out nor occupy the accelerator.
        self._wake_group = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
        context_length = int(loaded.config.get("encoder_seq_length") or loaded.config["max_position_embeddings"])
        self.info = ModelInfo(
            name=name,
            tokenizer=loaded.tokenizer,
            vocab_size=loaded.tokenizer.vocab_size,
            context_length=context_length,
            format=loaded.format,
            report={
                **loaded.capabilities.as_dict(),
                "tp_size": loaded.tp_size,
                "dtype": str(next(self._model.parameters()).dtype).removeprefix("torch."),
            },
        )

    def generate(self, samples: Sequence[Sample]) -> list[Completion]:
        """One completion per sample, in order. Rank 0 only.

        Raises:
            DrawError: all ranks gave the batch up together and stay usable.
        """
        results: dict[int, Completion] = {}
        for rows in _batches(samples):
            batch = [samples[row] for row in rows]
            self._send({"samples": [asdict(sample) for sample in batch]})
            results.update(zip(rows, self._run_together(batch), strict=True))
        return [results[row] for row in range(len(samples))]

    def follow(self) -> None:
        """The life of every other rank: wait for a batch, work on it, until rank 0 calls `close`.

        Signals are rank 0's to act on: it may still have answers to finish, and needs its partners for them.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        while (message := self._receive()) is not None:
            samples = [Sample(**{k: _tuples(v) for k, v in raw.items()}) for raw in message["samples"]]
            try:
                self._run_together(samples)
            except DrawError:
                logger.debug("gave a batch up together with rank 0")

    def close(self) -> None:
        """Let the other ranks end. Rank 0 only."""
        self._send(None)

    def _run_together(self, samples: Sequence[Sample]) -> list[Completion]:
        """Decode on this rank.

        Raises:
            DrawError: on every rank alike, so they are still in step (D-18).
        """
        try:
            with torch.inference_mode():
                return _decode(self._forward, samples, self.info, self._device)
        except DrawError:
            raise
        except Exception:
            if dist.get_world_size() > 1:
                # The other ranks may be inside a collective that this one left: nothing can be said to them any more.
                # Ending is what they notice, and the launcher then ends them.
                logger.critical("this rank failed inside the model; the server ends", exc_info=True)
                os._exit(EXIT_RANK_FAILED)
            raise

    def _forward(self, tokens: torch.Tensor, positions: torch.Tensor, context: Any) -> torch.Tensor:
        """Logits [B,S,V] in fp32 of the whole vocabulary, on every rank."""
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        amp = {"16": torch.float16}.get(self._loaded.precision)
        with torch.autocast(self._device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
            logits = self._model(tokens, positions, None, inference_context=context)
        return gather_from_tensor_model_parallel_region(logits).float()

    def _send(self, message: dict[str, Any] | None) -> None:
        body = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
        dist.broadcast(torch.tensor([len(body)]), src=0, group=self._wake_group)
        dist.broadcast(body, src=0, group=self._wake_group)

    def _receive(self) -> dict[str, Any] | None:
        size = torch.zeros(1, dtype=torch.int64)
        dist.broadcast(size, src=0, group=self._wake_group)
        body = torch.zeros(int(size.item()), dtype=torch.uint8)
        dist.broadcast(body, src=0, group=self._wake_group)
        return json.loads(bytes(body.numpy()))


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _batches(samples: Sequence[Sample]) -> list[list[int]]:
    """Row numbers in batches of similar prompt length."""
    by_length = sorted(range(len(samples)), key=lambda row: len(samples[row].prompt_ids))
    batches: list[list[int]] = []
    for row in by_length:
        batch = batches[-1] if batches else []
        if batch and len(batch) < MAX_ROWS and _spread(samples, batch[0], row) <= MAX_LENGTH_SPREAD:
            batch.append(row)
        else:
            batches.append([row])
    return batches


def _spread(samples: Sequence[Sample], shortest: int, row: int) -> int:
    return len(samples[row].prompt_ids) - len(samples[shortest].prompt_ids)


@dataclass
class _Row:
    """One prompt while it is being continued."""

    sample: Sample
    token_ids: list[int]
    generator: torch.Generator | None
    finish_reason: str | None = None
    logprob: list[float] = field(default_factory=list)
    full_logprob: list[list[float]] = field(default_factory=list)
    step: int = 0  # of the constraint
    chosen: tuple[int, ...] = ()  # tokens of that step so far
    num_overruled: int = 0

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - len(self.sample.prompt_ids)

    def completion(self) -> Completion:
        sample = self.sample
        return Completion(
            token_ids=tuple(self.token_ids),
            num_prompt_tokens=len(sample.prompt_ids),
            finish_reason=self.finish_reason or "length",
            logprob=tuple(self.logprob) if sample.compute_logprob else None,
            full_logprob=self.full_logprob if sample.all_probs else None,
            num_overruled=self.num_overruled,
        )

    def allowed(self) -> list[int]:
        """Next tokens the constraint permits."""
        done = len(self.chosen)
        return sorted({option[done] for option in self.sample.constraint[self.step] if option[:done] == self.chosen})

    def follow(self, token: int) -> bool:
        """Take a permitted token. True when the constraint is at its end."""
        self.chosen += (token,)
        if self.chosen in self.sample.constraint[self.step]:
            self.step, self.chosen = self.step + 1, ()
        return self.step == len(self.sample.constraint)


def _decode(forward: Any, samples: Sequence[Sample], info: ModelInfo, device: torch.device) -> list[Completion]:
    """Continue a batch; the same on every rank."""
    from megatron.core.inference.contexts import StaticInferenceContext

    rows = [_Row(sample, list(sample.prompt_ids), _generator(sample)) for sample in samples]
    shortest = min(len(sample.prompt_ids) for sample in samples)
    longest = max(len(sample.prompt_ids) + sample.tokens_to_generate for sample in samples)
    context = StaticInferenceContext(max_batch_size=len(rows), max_sequence_length=longest)
    wants_prompt_logprob = any(sample.compute_logprob or sample.all_probs for sample in samples)
    context.materialize_only_last_token_logits = not wants_prompt_logprob
    is_first = dist.get_rank() == 0
    start, end = 0, shortest
    while True:
        # A finished row is fed EOS to keep its place in the batch.
        chunk = [(row.token_ids + [info.tokenizer.eos_id] * end)[start:end] for row in rows]
        tokens = torch.tensor(chunk, dtype=torch.int64, device=device)
        positions = torch.arange(start, end, device=device).expand(len(rows), end - start)
        logits_BSV = forward(tokens, positions, context)
        context.sequence_len_offset += end - start
        drawn = torch.full((len(rows),), _FAILED, dtype=torch.int64)
        error: Exception | None = None
        if is_first:
            try:
                drawn = torch.tensor([_next_token(row, end, logits_BSV[i, -1], info) for i, row in enumerate(rows)])
            except Exception as err:  # the other ranks wait for what rank 0 drew, and must hear that it drew nothing
                error = err
        if dist.get_world_size() > 1:
            drawn = drawn.to(device)
            dist.broadcast(drawn, src=0)
        if drawn[0] == _FAILED:
            raise DrawError(f"rank 0 could not draw a token: {error}") from error
        for row, token, logits_SV in zip(rows, drawn.tolist(), logits_BSV, strict=True):
            _advance(row, token, start, end, logits_SV if wants_prompt_logprob and is_first else None, info)
        if all(row.finish_reason for row in rows):
            return [row.completion() for row in rows]
        start, end = end, end + 1


def _generator(sample: Sample) -> torch.Generator | None:
    if sample.random_seed is None:
        return None
    return torch.Generator().manual_seed(sample.random_seed)


def _next_token(row: _Row, end: int, logits_V: torch.Tensor, info: ModelInfo) -> int:
    """The id at position `end`: the prompt's, a drawn one, or EOS for a finished row."""
    if end < len(row.token_ids):
        return row.token_ids[end]
    if row.finish_reason is not None:
        return info.tokenizer.eos_id
    sample = row.sample
    logits = logits_V.cpu().clone()
    logits[info.vocab_size :] = -torch.inf  # padding of the vocabulary
    if sample.constraint:
        allowed = row.allowed()
        if len(sample.constraint[row.step]) > 1:
            row.num_overruled += int(logits.argmax()) not in allowed
        return allowed[int(logits[allowed].argmax())]
    if row.num_generated < sample.min_tokens_to_generate:
        logits[info.tokenizer.eos_id] = -torch.inf
    if sample.greedy:
        return int(logits.argmax())
    logits /= max(sample.temperature, 1e-6)  # below, everything but the likeliest token is at 0 in fp32 anyway
    _penalise_repetition(logits, row.token_ids, sample.repetition_penalty)
    if sample.top_k > 0:
        logits[logits < logits.topk(min(sample.top_k, info.vocab_size)).values[-1]] = -torch.inf
    if 0.0 < sample.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(0).cumsum(0) - ordered.softmax(0)
        logits[order[before > sample.top_p]] = -torch.inf  # the token that crosses the threshold stays
    return int(torch.multinomial(logits.softmax(0), 1, generator=row.generator))


def _penalise_repetition(logits: torch.Tensor, token_ids: Sequence[int], penalty: float) -> None:
    """Make ids that occurred less likely (CTRL, arXiv:1909.05858), whatever the sign of their logit."""
    if penalty == 1.0:
        return
    used = torch.tensor(sorted(set(token_ids)))
    logits[used] = torch.where(logits[used] > 0, logits[used] / penalty, logits[used] * penalty)


def _advance(row: _Row, token: int, start: int, end: int, logits_SV: torch.Tensor | None, info: ModelInfo) -> None:
    """Take the token of position `end` and see whether the row is finished."""
    if row.finish_reason is not None:
        return
    in_prompt = end < len(row.token_ids)
    if not in_prompt:
        row.token_ids.append(token)
    if logits_SV is not None:
        # Untempered, over the real vocabulary; logits at position t score the id at t+1.
        logprobs = logits_SV[:, : info.vocab_size].log_softmax(-1).cpu()
        if row.sample.compute_logprob:
            targets = row.token_ids[start + 1 : end + 1]
            row.logprob += [float(logprobs[t, target]) for t, target in enumerate(targets)]
        if row.sample.all_probs:
            row.full_logprob += logprobs.tolist()
    if not in_prompt:
        row.finish_reason = _finish_reason(row, token, info)


def _finish_reason(row: _Row, token: int, info: ModelInfo) -> str | None:
    sample = row.sample
    if sample.constraint:
        return "stop" if row.follow(token) else None
    if token in sample.stop_ids:
        return "stop"
    if sample.stop_texts:
        tail = info.tokenizer.decode(row.token_ids[len(sample.prompt_ids) :])
        if tail.endswith(sample.stop_texts):
            return "stop"
    return "length" if row.num_generated >= sample.tokens_to_generate else None
