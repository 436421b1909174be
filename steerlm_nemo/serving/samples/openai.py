"""OpenAI's requests as engine samples, and how their tokens become an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.engine.protocol import ModelInfo, Sample
from steerlm_nemo.engine.text import without_end
from steerlm_nemo.serving.requests.body import MAX_INTEGER, BadRequest
from steerlm_nemo.serving.requests.neutral import shown
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
    scores_prompts: bool = False  # log-probabilities are of the prompt's tokens, too
    hidden_ids: frozenset[int] = frozenset()  # tokens that end a text without being part of it
    keeps_stop: bool = False  # a text ends with the stop string that ended it
    min_tokens: int = 0  # what stands in the text of so many tokens is no stop

    def text(self, generated: str, first: int) -> str:
        """What the client sees of all generated text, in which stops count from character `first` on."""
        cut = self.until_stop(generated, first)
        return cut if cut != generated else self.trim(generated)

    def until_stop(self, generated: str, first: int) -> str:
        return without_end(generated, self.stops, first, keep=self.keeps_stop)


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
        own_stop_ids=prompt.stop_ids,
    )
    return _asked(
        request,
        samples,
        len(prompt.ids),
        ends=() if request.ignore_eos else prompt.ends,
        trim=str if request.ignore_eos else prompt.trim,
        echoes=("",) * len(samples),
    )


def completion_samples(request: CompletionRequest, info: ModelInfo, max_prompts: int) -> Asked:
    """Raises BadRequest."""
    prompts = request.prompts()
    _require_few(len(prompts), request, max_prompts)
    names = ["prompt"] if len(prompts) == 1 else [f"prompt[{index}]" for index in range(len(prompts))]
    rows = {name: _ids(prompt, request.add_BOS, info, name) for name, prompt in zip(names, prompts, strict=True)}
    scores_prompts = request.echo and request.logprobs is not None
    samples = _samples(request, rows, request.max_tokens, info, (), request.logprobs, prompt_logprobs=scores_prompts)
    echoes = [""] * len(prompts)
    if request.echo:
        echoes = [prompt if isinstance(prompt, str) else info.tokenizer.decode(prompt) for prompt in prompts]
    return _asked(
        request,
        samples,
        sum(map(len, rows.values())),
        ends=(),
        trim=str,
        echoes=tuple(text for text in echoes for _ in range(request.n)),
        scores_prompts=scores_prompts,
    )


def _asked(
    request: SampledRequest,
    samples: tuple[Sample, ...],
    num_prompt_tokens: int,
    *,
    ends: tuple[str, ...],
    trim: Callable[[str], str],
    echoes: tuple[str, ...],
    scores_prompts: bool = False,
) -> Asked:
    stop = request.stop_strings()
    return Asked(
        samples,
        num_prompt_tokens,
        stops=stop,
        ends=(*stop, *ends),
        trim=trim,
        echoes=echoes,
        scores_prompts=scores_prompts,
        hidden_ids=frozenset() if request.include_stop_str_in_output else frozenset(request.stop_token_ids),
        keeps_stop=request.include_stop_str_in_output,
        min_tokens=request.min_tokens,
    )


def _require_few(num_prompts: int, request: SampledRequest, max_prompts: int) -> None:
    if num_prompts * request.n > max_prompts:
        raise BadRequest(f"{num_prompts} prompts x n {request.n} are more than {max_prompts} choices", param="n")


def _ids(prompt: str | list[int], add_BOS: bool, info: ModelInfo, name: str) -> list[int]:
    if isinstance(prompt, str):
        return prompt_ids(prompt, info, add_BOS, name)
    return [*prompt_ids("", info, add_BOS, name), *_below_vocabulary(prompt, info, "prompt")]


def _below_vocabulary(ids: Sequence[int], info: ModelInfo, param: str) -> Sequence[int]:
    if ids and (highest := max(ids)) >= info.vocab_size:
        raise BadRequest(
            f"{param} has token id {highest}, which is not below the vocabulary size {info.vocab_size}", param=param
        )
    return ids


def _biases(request: SampledRequest, info: ModelInfo) -> tuple[tuple[int, float], ...]:
    for key in request.logit_bias:
        if not (key.isascii() and key.isdecimal() and len(key) < 20):
            raise BadRequest(
                f"logit_bias has the key {shown(key)}; keys must be token ids, such as '42'", param="logit_bias"
            )
    biases = {int(key): float(bias) for key, bias in request.logit_bias.items()}
    _below_vocabulary(tuple(biases), info, "logit_bias")
    return tuple(biases.items())


def _samples(
    request: SampledRequest,
    rows: Mapping[str, Sequence[int]],
    max_tokens: int,
    info: ModelInfo,
    markers: Sequence[str],
    num_top_logprobs: int | None,
    *,
    prompt_logprobs: bool = False,
    own_stop_ids: Sequence[int] = (),
) -> tuple[Sample, ...]:
    """`n` per row of prompt tokens, by the name that errors have for it; choice i of a prompt draws with seed + i."""
    stop_ids, stop_texts = stops(markers, info)
    stop_ids = (*stop_ids, *own_stop_ids)
    if request.ignore_eos:
        stop_ids, stop_texts = (), ()
    stop_ids = tuple(dict.fromkeys((*stop_ids, *_below_vocabulary(request.stop_token_ids, info, "stop_token_ids"))))
    biases = _biases(request, info)
    rules = (request.repetition_penalty, request.frequency_penalty, request.presence_penalty, biases)
    likeliest = request.temperature == 0 or request.top_p == 0
    # A greedy row of the engine knows no rules: the likeliest token under them is drawn from the best one.
    best_of_rules = likeliest and rules != (1, 0, 0, ())
    made = []
    for name, ids in rows.items():
        fills = not max_tokens and 0 < len(ids) <= info.context_length  # nothing is to come, so nothing needs room
        num_tokens = 0 if fills else min(max_tokens, room_for(ids, info, name))
        sample = Sample(
            prompt_ids=tuple(ids),
            tokens_to_generate=num_tokens,
            min_tokens_to_generate=min(request.min_tokens, num_tokens),
            stops_wait=True,
            greedy=likeliest and not best_of_rules,
            temperature=1.0 if best_of_rules else request.temperature,
            top_k=1 if best_of_rules else min(max(request.top_k, 0), info.vocab_size),
            top_p=request.top_p,
            min_p=request.min_p,
            repetition_penalty=request.repetition_penalty,
            frequency_penalty=request.frequency_penalty,
            presence_penalty=request.presence_penalty,
            logit_bias=biases,
            stop_ids=stop_ids,
            stop_texts=stop_texts,
            stop_anywhere=request.stop_strings(),
            token_logprobs=num_top_logprobs is not None,
            top_logprobs=num_top_logprobs or 0,
            prompt_logprobs=prompt_logprobs or not num_tokens,
        )
        for choice in range(request.n):
            seed = None if request.seed is None else (request.seed + choice) % 2**63
            made.append(replace(sample, random_seed=seed))
    return tuple(made)
