"""POST /v1/attribute_lines: full attribute lines of a value model, every value legal, with probabilities."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import NotRequired, TypedDict

from steerlm_nemo.attributes import LANG
from steerlm_nemo.engine.protocol import Choice, Completion, ModelInfo
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.serving.http import json_response
from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.requests.grading import AttributeLinesRequest
from steerlm_nemo.serving.routes.operation import Server
from steerlm_nemo.serving.samples.attribute_lines import Known, line_samples


class ChosenValue(TypedDict):
    """A value that the model chose. The probabilities of the legal values have the sum 1."""

    value: int | str
    probabilities: dict[str, float]
    expected: float | None
    confidence: float
    logprob: float


class AttributeLinesAnswer(TypedDict):
    """`num_overruled` counts values where the model's own first choice was not legal; `model` is its identity."""

    lines: list[str]
    num_overruled: list[int]
    model: str
    attributes: NotRequired[list[dict[str, ChosenValue]]]


async def attribute_lines(server: Server, request: Request, body: AttributeLinesRequest) -> Response:
    served = server.format()
    given = body.given or [None] * len(body.prompts)
    if len(given) != len(body.prompts):
        raise BadRequest(
            f"given has {len(given)} entries for {len(body.prompts)} prompts; it must have one entry per prompt"
        )
    prompts = {f"prompts[{index}]": prompt for index, prompt in enumerate(body.prompts)}
    samples = await asyncio.to_thread(line_samples, prompts, given, server.info, served)
    completions = await server.calls.complete(request, samples)
    answer: AttributeLinesAnswer = {
        "lines": lines_of(completions, server.info, served),
        "num_overruled": [completion.num_overruled for completion in completions],
        "model": server.info.identity,
    }
    if body.beliefs:
        answer["attributes"] = [
            chosen_values(completion, known, served) for completion, known in zip(completions, given, strict=True)
        ]
    return json_response(answer)


def lines_of(completions: Sequence[Completion], info: ModelInfo, served: SteerLMFormat) -> list[str]:
    texts = (info.tokenizer.decode(list(row.token_ids[row.num_prompt_tokens :])) for row in completions)
    return [text.removesuffix(served.template.end_of_name) for text in texts]


def chosen_values(completion: Completion, known: Known | None, served: SteerLMFormat) -> dict[str, ChosenValue]:
    """Per attribute that was not known, what was chosen and how sure the model was."""
    found: dict[str, ChosenValue] = {}
    choices = iter(completion.choices)
    for key in served.schema.keys():  # noqa: SIM118 - no mapping
        legal = served.schema.legal_values(key)
        if known and key in known:
            continue
        # A single legal value is no choice: it is certain.
        choice = next(choices) if len(legal) > 1 else Choice(0, (0.0,))
        highest = max(choice.logprobs)
        weights = [math.exp(logprob - highest) for logprob in choice.logprobs]
        shares = [weight / sum(weights) for weight in weights]
        text = legal[choice.chosen]
        found[key] = {
            "value": text if key == LANG else int(text),
            "probabilities": dict(zip(legal, shares, strict=True)),
            "expected": None
            if key == LANG
            else sum(int(value) * share for value, share in zip(legal, shares, strict=True)),
            "confidence": shares[choice.chosen],
            "logprob": choice.logprobs[choice.chosen],
        }
    return found
