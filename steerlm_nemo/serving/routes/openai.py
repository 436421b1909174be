"""The endpoints that OpenAI's clients call: chat steered by `attributes`, plain completions, models."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import Response
from typing_extensions import NotRequired, TypedDict

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.engine.protocol import Completion, ModelInfo, Sample, TokenMade
from steerlm_nemo.engine.text import GrowingText, safe_length, token_bytes, without_end
from steerlm_nemo.serving.http import Done, EventStream, Made, json_response
from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.requests.openai import ChatRequest, CompletionRequest, SampledRequest
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
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
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
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        return EventStream(_events(server.calls.stream(request, asked.samples), asked, form, include_usage))
    completions = await server.calls.complete(request, asked.samples)
    return await asyncio.to_thread(lambda: json_response(_whole(completions, asked, form)))


class _Row:
    """One choice as it grows: its text, and which tokens begin where in it."""

    def __init__(self, sample: Sample, asked: Asked, info: ModelInfo) -> None:
        self._growing = GrowingText(info.tokenizer, sample.prompt_ids)
        self._asked = asked
        self._num_told = 0
        self._untold: list[tuple[int, TokenMade]] = []  # (where its text begins, token)

    def add(self, token: TokenMade) -> None:
        self._untold.append((len(self._growing.text), token))
        self._growing.add(token.token_id)

    def news(self) -> tuple[str, list[tuple[int, TokenMade]]]:
        """Text that can be shown now and was not yet, and the tokens it begins with."""
        cut = without_end(self._growing.text, self._asked.stops)
        if cut != self._growing.text:
            return self._tell(cut)
        return self._tell(cut[: safe_length(cut, self._asked.ends)])

    def rest(self) -> tuple[str, list[tuple[int, TokenMade]]]:
        """The same when no token is to come."""
        return self._tell(self._asked.text(self._growing.finish()))

    def _tell(self, text: str) -> tuple[str, list[tuple[int, TokenMade]]]:
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
    def delta(self, text: str | None, logprobs: Any) -> dict[str, Any]:
        """What a choice has grown by; `text` is None where it has ended."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[tuple[int, TokenMade]], first_place: int) -> dict[str, Any] | None:
        """Of these tokens, whose texts begin at the given places; None where they have none."""

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

    def delta(self, text: str | None, logprobs: Any) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}, "logprobs": logprobs}

    def logprobs(self, tokens: Sequence[tuple[int, TokenMade]], first_place: int) -> dict[str, Any] | None:
        def entry(token_id: int, logprob: float) -> dict[str, Any]:
            text, utf8 = self.spell(token_id)
            return {"token": text, "bytes": list(utf8), "logprob": logprob}

        content = []
        for _, token in tokens:
            if token.logprob is None:
                return None
            top = [entry(*pair) for pair in token.top_logprobs]
            content.append({**entry(token.token_id, token.logprob), "top_logprobs": top})
        return {"content": content, "refusal": None}


class _CompletionForm(_Form):
    whole, part, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, text: str, logprobs: Any) -> dict[str, Any]:
        return {"text": text, "logprobs": logprobs}

    def delta(self, text: str | None, logprobs: Any) -> dict[str, Any]:
        return self.choice(text or "", logprobs)

    def logprobs(self, tokens: Sequence[tuple[int, TokenMade]], first_place: int) -> dict[str, Any] | None:
        if any(token.logprob is None for _, token in tokens):
            return None
        return {
            "tokens": [self.spell(token.token_id)[0] for _, token in tokens],
            "token_logprobs": [token.logprob for _, token in tokens],
            "top_logprobs": [
                # Tokens that spell alike, such as parts of characters, are one entry: the likeliest.
                {self.spell(token_id)[0]: logprob for token_id, logprob in reversed(token.top_logprobs)}
                for _, token in tokens
            ],
            "text_offset": [first_place + place for place, _ in tokens],
        }


def _whole(completions: Sequence[Completion], asked: Asked, form: _Form) -> dict[str, Any]:
    choices = []
    for index, (completion, sample) in enumerate(zip(completions, asked.samples, strict=True)):
        row = _Row(sample, asked, form.info)
        for token in _tokens(completion):
            row.add(token)
        text, tokens = row.rest()
        logprobs = form.logprobs(tokens, len(asked.echoes[index])) if sample.token_logprobs else None
        choice = form.choice(asked.echoes[index] + text, logprobs)
        choices.append({"index": index, "finish_reason": completion.finish_reason, **choice})
    return {**form.head, "object": form.whole, "choices": choices, "usage": _usage(completions, asked)}


def _tokens(completion: Completion) -> list[TokenMade]:
    generated = completion.token_ids[completion.num_prompt_tokens :]
    nothing: tuple[tuple[int, float], ...] = ()
    return [
        TokenMade(0, token_id, logprob, top)
        for token_id, logprob, top in zip(
            generated,
            completion.token_logprobs or (None,) * len(generated),
            completion.top_logprobs or (nothing,) * len(generated),
            strict=True,
        )
    ]


async def _events(
    source: AsyncGenerator[Made | Done], asked: Asked, form: _Form, include_usage: bool
) -> AsyncGenerator[object]:
    head = {**form.head, "object": form.part}
    if include_usage:
        head["usage"] = None
    rows = [_Row(sample, asked, form.info) for sample in asked.samples]

    def event(index: int, news: tuple[str | None, list[tuple[int, TokenMade]]], ends: str | None = None) -> object:
        text, tokens = news
        has_scores = asked.samples[index].token_logprobs and tokens
        logprobs = form.logprobs(tokens, len(asked.echoes[index])) if has_scores else None
        return {**head, "choices": [{"index": index, "finish_reason": ends, **form.delta(text, logprobs)}]}

    for index, echo in enumerate(asked.echoes):
        if isinstance(form, _ChatForm):
            first = {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
            yield {**head, "choices": [{"index": index, "finish_reason": None, **first}]}
        elif echo:
            yield event(index, (echo, []))
    async with aclosing(source):
        async for made in source:
            if isinstance(made, Done):
                completions = made.completions
                break
            touched = dict.fromkeys(index for index, _ in made)
            for index, token in made:
                rows[index].add(token)
            for index in touched:
                news = rows[index].news()
                if news[0]:
                    yield event(index, news)
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        news = row.rest()
        if news[0]:
            yield event(index, news)
        yield event(index, (None, []), completion.finish_reason)
    if include_usage:
        yield {**head, "choices": [], "usage": _usage(completions, asked)}


def _usage(completions: Sequence[Completion], asked: Asked) -> dict[str, int]:
    num_generated = sum(len(completion.token_ids) - completion.num_prompt_tokens for completion in completions)
    return {
        "prompt_tokens": asked.num_prompt_tokens,
        "completion_tokens": num_generated,
        "total_tokens": asked.num_prompt_tokens + num_generated,
    }
