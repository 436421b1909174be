"""OpenAI's requests as engine samples, and how their tokens become an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.engine.protocol import ModelInfo, Sample
from steerlm_nemo.engine.text import without_end
from steerlm_nemo.serving.requests.body import MAX_INTEGER, BadRequest
from steerlm_nemo.serving.requests.openai import ChatRequest, CompletionRequest, SampledRequest
from steerlm_nemo.serving.samples.chat import Chat
from steerlm_nemo.serving.samples.prompts import prompt_ids, room_for, stops


@dataclass(frozen=True)
class Asked:
    """A request as samples, one per choice, and how the tokens of a choice become its text."""

    samples: tuple[Sample, ...]
    num_prompt_tokens: int  # each prompt once, however many choices it has
    stops: tuple[str, ...]  # where the text of a choice ends
    ends: tuple[str, ...]  # what must not be shown before it is known that the text goes on after it
    trim: Callable[[str], str]  # what the template put at the end of a text
    echoes: tuple[str, ...]  # per choice, the prompt to show before the text

    def text(self, generated: str) -> str:
        """What the client sees of all generated text."""
        cut = without_end(generated, self.stops)
        return cut if cut != generated else self.trim(generated)


def chat_samples(request: ChatRequest, line: Attributes | None, info: ModelInfo, chat: Chat, max_prompts: int) -> Asked:
    """Raises BadRequest."""
    _require_few(1, request, max_prompts)
    prompt = chat.prompt(request, line)
    limits = [limit for limit in (request.max_completion_tokens, request.max_tokens) if limit is not None]
    samples = _samples(
        request,
        {"messages": prompt.ids},
        min(limits, default=MAX_INTEGER),
        info,
        prompt.markers,
        request.num_top_logprobs(),
    )
    if prompt.stop_ids:
        samples = tuple(
            replace(sample, stop_ids=tuple(dict.fromkeys((*sample.stop_ids, *prompt.stop_ids)))) for sample in samples
        )
    return Asked(
        samples,
        len(prompt.ids),
        request.stop_strings(),
        (*request.stop_strings(), *prompt.ends),
        prompt.trim,
        ("",) * len(samples),
    )


def completion_samples(request: CompletionRequest, info: ModelInfo, max_prompts: int) -> Asked:
    """Raises BadRequest."""
    prompts = request.prompts()
    _require_few(len(prompts), request, max_prompts)
    names = ["prompt"] if len(prompts) == 1 else [f"prompt[{index}]" for index in range(len(prompts))]
    rows = {name: _ids(prompt, request.add_BOS, info, name) for name, prompt in zip(names, prompts, strict=True)}
    samples = _samples(request, rows, request.max_tokens, info, (), request.logprobs)
    echoes = [""] * len(prompts)
    if request.echo:
        echoes = [prompt if isinstance(prompt, str) else info.tokenizer.decode(prompt) for prompt in prompts]
    stop = request.stop_strings()
    return Asked(
        samples,
        sum(map(len, rows.values())),
        stop,
        stop,
        str,
        tuple(text for text in echoes for _ in range(request.n)),
    )


def _require_few(num_prompts: int, request: SampledRequest, max_prompts: int) -> None:
    if num_prompts * request.n > max_prompts:
        raise BadRequest(f"{num_prompts} prompts x n {request.n} are more than {max_prompts} choices", param="n")


def _ids(prompt: str | list[int], add_BOS: bool, info: ModelInfo, name: str) -> list[int]:
    if isinstance(prompt, str):
        return prompt_ids(prompt, info, add_BOS, name)
    if (highest := max(prompt)) >= info.vocab_size:
        raise BadRequest(f"token id {highest} is not below the vocabulary size {info.vocab_size}", param="prompt")
    return [*prompt_ids("", info, add_BOS, name), *prompt]


def _samples(
    request: SampledRequest,
    rows: Mapping[str, Sequence[int]],
    max_tokens: int,
    info: ModelInfo,
    markers: Sequence[str],
    num_top_logprobs: int | None,
) -> tuple[Sample, ...]:
    """`n` per row of prompt tokens, by the name that errors have for it; choice i of a prompt draws with seed + i."""
    stop_ids, stop_texts = stops(markers, info)
    made = []
    for name, ids in rows.items():
        sample = Sample(
            prompt_ids=tuple(ids),
            tokens_to_generate=min(max_tokens, room_for(ids, info, name)),
            greedy=request.temperature == 0 or request.top_p == 0,
            temperature=request.temperature,
            top_k=min(request.top_k, info.vocab_size),
            top_p=request.top_p,
            repetition_penalty=request.repetition_penalty,
            stop_ids=stop_ids,
            stop_texts=stop_texts,
            stop_anywhere=request.stop_strings(),
            token_logprobs=num_top_logprobs is not None,
            top_logprobs=num_top_logprobs or 0,
        )
        for choice in range(request.n):
            seed = None if request.seed is None else (request.seed + choice) % 2**63
            made.append(replace(sample, random_seed=seed))
    return tuple(made)
