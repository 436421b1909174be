"""The endpoints that OpenAI's clients call: chat steered by `attributes`, plain completions, models."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import NotRequired, TypedDict

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.engine.protocol import Completion, ModelInfo, Sample, TokenMade
from steerlm_nemo.engine.text import GrowingText, safe_length, token_bytes
from steerlm_nemo.serving.http import Done, EventStream, Made, json_response
from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.requests.openai import ChatRequest, CompletionRequest, SampledRequest, StreamOptions
from steerlm_nemo.serving.routes.operation import Server, abilities_of, what_it_is
from steerlm_nemo.serving.samples.openai import Asked, chat_samples, completion_samples

Ends = Literal["stop", "length"]


class Usage(TypedDict):
    """Real tokens, the one that ended a text included; each prompt once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SpelledToken(TypedDict):
    token: str
    bytes: list[int]
    logprob: float


class ChatToken(SpelledToken):
    top_logprobs: list[SpelledToken]


class ChatLogprobs(TypedDict):
    content: list[ChatToken]
    refusal: None


class CompletionLogprobs(TypedDict):
    """A text's first token has none, where the prompt is part of the text. `top_logprobs` has the token itself, too."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class ChatMessage(TypedDict):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(TypedDict):
    index: int
    finish_reason: Ends
    message: ChatMessage
    logprobs: ChatLogprobs | None


class ChatDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str


class ChatChunkChoice(TypedDict):
    index: int
    finish_reason: Ends | None
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class CompletionChoice(TypedDict):
    index: int
    finish_reason: Ends
    text: str
    logprobs: CompletionLogprobs | None


class CompletionChunkChoice(TypedDict):
    index: int
    finish_reason: Ends | None
    text: str
    logprobs: CompletionLogprobs | None


class Head(TypedDict):
    id: str
    created: int
    model: str
    system_fingerprint: str | None


class ChatAnswer(Head):
    """`attributes` is the full line that the response was asked for at, by a model that has attributes."""

    object: Literal["chat.completion"]
    attributes: NotRequired[dict[str, int | str]]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Head):
    object: Literal["chat.completion.chunk"]
    attributes: NotRequired[dict[str, int | str]]
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class CompletionAnswer(Head):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(Head):
    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: NotRequired[Usage | None]


class Model(TypedDict):
    """`title` says what the model is, after "is"; `abilities` are what it can be asked for; `template` is how messages
    become a prompt: by this project's markers, or by the chat template that the model brings."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    context_length: int
    kind: str | None
    title: str
    abilities: list[str]
    template: Literal["markers", "own"] | None


class Models(TypedDict):
    object: Literal["list"]
    data: list[Model]


async def chat(server: Server, request: Request, body: ChatRequest) -> Response:
    _require_model(body.model, server.info)
    chatting = server.chat()
    line = chatting.line(body)
    asked = await asyncio.to_thread(chat_samples, body, line, server.info, chatting, server.max_prompts)
    return await _answer(server, request, body, asked, _ChatForm(server.info, line))


async def completions(server: Server, request: Request, body: CompletionRequest) -> Response:
    _require_model(body.model, server.info)
    asked = await asyncio.to_thread(completion_samples, body, server.info, server.max_prompts)
    return await _answer(server, request, body, asked, _CompletionForm(server.info))


async def models(server: Server, request: Request, body: None) -> Response:
    found: Models = {"object": "list", "data": [_card(server)]}
    return json_response(found)


async def model(server: Server, request: Request, body: None) -> Response:
    _require_model(request.path_params["model"], server.info)
    return json_response(_card(server))


def _card(server: Server) -> Model:
    info = server.info
    return {
        "id": info.name,
        "object": "model",
        "created": server.started,
        "owned_by": "steerlm-nemo",
        "context_length": info.context_length,
        "kind": info.format.kind.name if info.format else None,
        "title": what_it_is(info),
        "abilities": sorted(abilities_of(info, server.chatting)),
        "template": server.chatting.template if server.chatting else "markers" if info.format else None,
    }


def _require_model(name: str | None, info: ModelInfo) -> None:
    if name is not None and name != info.name:
        raise BadRequest(
            f"model {name[:100]!r} is not served here; this server has {info.name!r}",
            param="model",
            code="model_not_found",
            status=404,
        )


async def _answer(server: Server, request: Request, body: SampledRequest, asked: Asked, form: _Form) -> Response:
    if body.stream:
        options = body.stream_options or StreamOptions()
        return EventStream(_events(server.calls.stream(request, asked.samples), asked, form, options))
    completions = await server.calls.complete(request, asked.samples)
    return await asyncio.to_thread(lambda: json_response(_whole(completions, asked, form)))


Placed = list[tuple[int, TokenMade]]  # (where its text begins, token)


class _Row:
    """One choice as it grows: its text, and which tokens begin where in it."""

    def __init__(self, sample: Sample, asked: Asked, info: ModelInfo) -> None:
        self._growing = GrowingText(info.tokenizer, sample.prompt_ids)
        self._asked = asked
        self._num_told = 0
        self._untold: Placed = []
        self._first = 0  # character from which on stops count
        self.num_tokens = 0
        self.has_begun = False  # something of it was sent
        self.has_ended = False

    def add(self, token: TokenMade) -> None:
        self._untold.append((len(self._growing.text), token))
        self.num_tokens += 1
        if token.finish_reason != "stop" or token.token_id not in self._asked.hidden_ids:
            self._growing.add(token.token_id)
        if self.num_tokens == self._asked.min_tokens:
            self._first = len(self._growing.text)

    def news(self) -> tuple[str, Placed]:
        """Text that can be shown now and was not yet, and the tokens it begins with."""
        cut = self._asked.until_stop(self._growing.text, self._first)
        if cut != self._growing.text:
            return self._tell(cut)
        return self._tell(cut[: safe_length(cut, self._asked.ends)])

    def rest(self) -> tuple[str, Placed]:
        """The same when no token is to come. Where prompts are scored, no token is left out: clients count them."""
        text = self._asked.text(self._growing.finish(), self._first)
        if self._asked.scores_prompts:
            untold, self._untold = self._untold, []
            return text, [(min(place, len(text)), token) for place, token in untold]
        return self._tell(text)

    def _tell(self, text: str) -> tuple[str, Placed]:
        new, self._num_told = text[self._num_told :], len(text)
        told = [item for item in self._untold if item[0] < len(text)]
        del self._untold[: len(told)]
        return new, told


class _Form(ABC):
    """How an endpoint spells its answers."""

    whole: str  # `object` of an answer
    part: str  # and of a piece of a streamed one
    prefix: str  # of ids

    def __init__(self, info: ModelInfo) -> None:
        self.info = info
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": info.name,
            "system_fingerprint": info.identity or None,
        }

    @abstractmethod
    def choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        """A whole choice, without its number and its end."""

    @abstractmethod
    def delta(self, text: str, logprobs: Any, *, is_first: bool) -> dict[str, Any]:
        """What a choice has grown by."""

    @abstractmethod
    def logprobs(self, tokens: Placed) -> dict[str, Any]:
        """Of these tokens."""

    def spell(self, token_id: int) -> tuple[str, bytes]:
        utf8 = token_bytes(self.info.tokenizer, token_id)
        return utf8.decode("utf-8", "replace"), utf8


class _ChatForm(_Form):
    whole, part, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def __init__(self, info: ModelInfo, line: Attributes | None) -> None:
        super().__init__(info)
        if line is not None:
            self.head["attributes"] = line.as_dict()

    def choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": logprobs}

    def delta(self, text: str, logprobs: Any, *, is_first: bool) -> dict[str, Any]:
        # The role comes with the first text, not before it: load tools take the first chunk for the first token.
        delta = {"role": "assistant", "content": text} if is_first else {"content": text} if text else {}
        return {"delta": delta, "logprobs": logprobs}

    def logprobs(self, tokens: Placed) -> dict[str, Any]:
        def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
            text, utf8 = self.spell(token_id)
            return {"token": text, "bytes": list(utf8), "logprob": logprob}

        content = []
        for _, token in tokens:
            top = [entry(*pair) for pair in token.top_logprobs]
            content.append({**entry(token.token_id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}


class _CompletionForm(_Form):
    whole, part, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs}

    def delta(self, text: str, logprobs: Any, *, is_first: bool) -> dict[str, Any]:
        return self.choice(text, logprobs)

    def logprobs(self, tokens: Placed) -> dict[str, Any]:
        return {
            "tokens": [self.spell(token.token_id)[0] for _, token in tokens],
            "token_logprobs": [token.logprob for _, token in tokens],
            "top_logprobs": [self._top(token) for _, token in tokens],
            "text_offset": [place for place, _ in tokens],
        }

    def _top(self, token: TokenMade) -> dict[str, float] | None:
        """The likeliest and the token itself; None for the first of a prompt."""
        if token.logprob is None:
            return None
        # Tokens that spell alike, such as parts of characters, are one entry: the likeliest.
        worst_first = [(token.token_id, token.logprob), *reversed(token.top_logprobs)]
        return {self.spell(token_id)[0]: logprob for token_id, logprob in worst_first}


def _whole(completions: Sequence[Completion], asked: Asked, form: _Form) -> dict[str, Any]:
    choices = []
    for index, completion in enumerate(completions):
        text, tokens = _whole_text(index, completion, asked, form.info)
        logprobs = form.logprobs(tokens) if asked.samples[index].token_logprobs else None
        choices.append({"index": index, "finish_reason": completion.finish_reason, **form.choice(text, logprobs)})
    num_generated = sum(len(completion.token_ids) - completion.num_prompt_tokens for completion in completions)
    return {**form.head, "object": form.whole, "choices": choices, "usage": _usage(num_generated, asked)}


def _whole_text(index: int, completion: Completion, asked: Asked, info: ModelInfo) -> tuple[str, Placed]:
    """Of a choice, with the prompt where it is echoed; and the tokens in it that have log-probabilities."""
    echo, num_prompt = asked.echoes[index], completion.num_prompt_tokens
    tokens = _tokens(completion, asked.scores_prompts)
    row = _Row(asked.samples[index], asked, info)
    for token in tokens[num_prompt if asked.scores_prompts else 0 :]:
        row.add(token)
    text, placed = row.rest()
    placed = [(len(echo) + place, token) for place, token in placed]
    if asked.scores_prompts:
        places = _offsets(info, completion.token_ids[:num_prompt], echo)
        placed = [*zip(places, tokens[:num_prompt], strict=True), *placed]
    return echo + text, placed


def _offsets(info: ModelInfo, ids: Sequence[int], text: str) -> list[int]:
    """Where the tokens of a text begin in it."""
    growing, places = GrowingText(info.tokenizer, ()), []
    for token_id in ids:
        places.append(min(len(growing.text), len(text)))
        growing.add(token_id)
    return places


def _tokens(completion: Completion, with_prompt: bool) -> list[TokenMade]:
    """The generated tokens, or all, of which the first has no log-probability."""
    nothing: tuple[tuple[int, float], ...] = ()
    ids = completion.token_ids[0 if with_prompt else completion.num_prompt_tokens :]
    count = len(ids) - with_prompt
    # Where nothing was generated the engine has scored the prompt, whether anybody asked for that or not.
    scored = count if ids else 0
    logprobs = (completion.token_logprobs or (None,) * count)[:scored]
    tops = (completion.top_logprobs or (nothing,) * count)[:scored]
    if with_prompt:
        logprobs, tops = (None, *logprobs), (nothing, *tops)
    tokens = [TokenMade(0, *each) for each in zip(ids, logprobs, tops, strict=True)]
    return [*tokens[:-1], *(replace(token, finish_reason=completion.finish_reason) for token in tokens[-1:])]


async def _events(
    source: AsyncGenerator[Made | Done], asked: Asked, form: _Form, options: StreamOptions
) -> AsyncGenerator[object]:
    rows = [_Row(sample, asked, form.info) for sample in asked.samples]

    def usage() -> dict[str, int]:
        return _usage(sum(row.num_tokens for row in rows), asked)

    def event(index: int, text: str, tokens: Placed, ends: str | None = None) -> object:
        row, has_scores = rows[index], asked.samples[index].token_logprobs and tokens
        delta = form.delta(text, form.logprobs(tokens) if has_scores else None, is_first=not row.has_begun)
        row.has_begun = True
        head = {**form.head, "object": form.part}
        if options.asks:
            head["usage"] = usage() if options.continuous_usage_stats else None
        return {**head, "choices": [{"index": index, "finish_reason": ends, **delta}]}

    def grown(index: int, text: str, tokens: Placed) -> Iterator[object]:
        """An event with what a choice has grown by, if that is anything."""
        echo = asked.echoes[index]
        if not rows[index].has_begun and not asked.scores_prompts:
            text = echo + text
        if text:
            yield event(index, text, [(len(echo) + place, token) for place, token in tokens])

    def ended(index: int, finish_reason: str) -> Iterator[object]:
        rows[index].has_ended = True
        yield from grown(index, *rows[index].rest())
        yield event(index, "", [], finish_reason)

    async with aclosing(source):
        async for made in source:
            if isinstance(made, Done):
                completions = made.completions
                break
            for index, token in made:
                rows[index].add(token)
            if asked.scores_prompts:
                continue  # the log-probabilities of the prompt, which come first, are there at the end
            finished = {index: token.finish_reason for index, token in made if token.finish_reason is not None}
            for index in dict.fromkeys(index for index, _ in made):
                for each in ended(index, finished[index]) if index in finished else grown(index, *rows[index].news()):
                    yield each
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        if asked.scores_prompts:
            yield event(index, *_whole_text(index, completion, asked, form.info))
            yield event(index, "", [], completion.finish_reason)
        elif not row.has_ended:
            for each in ended(index, completion.finish_reason):
                yield each
    if options.include_usage:
        yield {**form.head, "object": form.part, "choices": [], "usage": usage()}


def _usage(num_generated: int, asked: Asked) -> dict[str, int]:
    return {
        "prompt_tokens": asked.num_prompt_tokens,
        "completion_tokens": num_generated,
        "total_tokens": asked.num_prompt_tokens + num_generated,
    }
