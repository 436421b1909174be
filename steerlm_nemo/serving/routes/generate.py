"""PUT and POST /generate, as NeMo's clients know it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import NotRequired, TypedDict

from steerlm_nemo.engine.protocol import Completion, ModelInfo
from steerlm_nemo.serving.http import json_response
from steerlm_nemo.serving.requests.generate import GenerateRequest
from steerlm_nemo.serving.routes.operation import Server
from steerlm_nemo.serving.samples.generate import generate_samples


class GenerateAnswer(TypedDict):
    """A row per sentence. Log-probabilities are of every token after the first, prompts included."""

    sentences: list[str]
    tokens: list[list[str]]
    token_ids: list[list[int]]
    logprob: list[list[float | None] | None] | None
    offsets: list[list[int]]
    full_logprob: NotRequired[list[list[list[float | None]]]]


async def generate(server: Server, request: Request, body: GenerateRequest) -> Response:
    samples = await asyncio.to_thread(generate_samples, body, server.info)
    completions = await server.calls.complete(request, samples)
    return await asyncio.to_thread(
        lambda: json_response(_answer(body, completions, server.info, pads_rows=server.pads_rows))
    )


def _answer(
    body: GenerateRequest, completions: Sequence[Completion], info: ModelInfo, *, pads_rows: bool
) -> GenerateAnswer:
    tokenizer = info.tokenizer
    rows = [list(completion.token_ids) for completion in completions]
    if pads_rows:
        longest = max(len(row) for row in rows)
        rows = [row + [tokenizer.eos_id] * (longest - len(row)) for row in rows]
    tokens = [[tokenizer.id_to_piece(token_id) for token_id in row] for row in rows]
    special = {tokenizer.bos_id, tokenizer.eos_id}
    answer: GenerateAnswer = {
        "sentences": [
            sentence + completion_text(completion, info)
            for sentence, completion in zip(body.sentences, completions, strict=True)
        ],
        "tokens": tokens,
        "token_ids": rows,
        "logprob": [list(completion.logprob or ()) for completion in completions] if body.compute_logprob else None,
        "offsets": [_offsets(row, pieces, special) for row, pieces in zip(rows, tokens, strict=True)],
    }
    if body.all_probs:
        answer["full_logprob"] = [completion.full_logprob or [] for completion in completions]  # type: ignore[misc]
    return answer


def completion_text(completion: Completion, info: ModelInfo) -> str:
    """What the generated tokens add to the decoded prompt.

    Clients cut `len(prompt)` characters off a sentence, so the answer must begin with the prompt as it was sent.
    Decoding everything together gives that only if the tokenizer round-trips: Hugging Face drops special tokens.
    """
    ids = list(completion.token_ids)
    prompt = info.tokenizer.decode(ids[: completion.num_prompt_tokens])
    return info.tokenizer.decode(ids)[len(prompt) :]


def _offsets(token_ids: Sequence[int], pieces: Sequence[str], special: set[int | None]) -> list[int]:
    """Start of each piece when the pieces are joined, special pieces counting nothing (the reference's offsets)."""
    offsets, position = [], 0
    for token_id, piece in zip(token_ids, pieces, strict=True):
        offsets.append(position)
        position += 0 if token_id in special else len(piece)
    return offsets
