"""Asking a SteerLM model for a response at requested attribute values (SteerLM, arXiv:2310.05344, step 3).

The prompt is built by the template the model was trained with, fetched from its server, so its bytes are a prefix
of training text (the tutorial's own client differs in five places, D-31). The response is what follows the prompt
as it was sent (D-32), without its end marker.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.client.job import Done, Words, require_sound, working_through
from steerlm_nemo.client.pool import ServerPool
from steerlm_nemo.conversation import SYSTEM_PROMPT, told_by_keys
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.messages import conversation_of
from steerlm_nemo.model_kind import STEER, SteerLMFormat
from steerlm_nemo.records import RawLine, dump_record

WORDS = Words("steer", "answered", "no response", "", "--output_file")


@dataclass(frozen=True)
class Sampling:
    """How a response is drawn; the reference's tutorial is greedy."""

    tokens_to_generate: int = 512
    greedy: bool = True
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.9
    random_seed: int | None = None

    def body(self) -> dict[str, Any]:
        return {
            "tokens_to_generate": self.tokens_to_generate,
            "greedy": self.greedy,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "repetition_penalty": 1.0,
            "add_BOS": False,  # training has none
            "random_seed": self.random_seed,
        }


@dataclass(frozen=True)
class SteeredResponse:
    """`attributes` is the full line the model was given; `prompt` the text that was sent."""

    text: str
    attributes: Attributes
    prompt: str


def steer(
    messages: str | Sequence[Mapping[str, object]],
    attributes: Mapping[str, int | str],
    endpoint: str | ServerPool = "127.0.0.1:1427",
    *,
    system: str = SYSTEM_PROMPT,
    sampling: Sampling | None = None,
) -> SteeredResponse:
    """The model's response to a conversation, at the requested attribute values.

    `messages` is one user text, or a list of {"role": "user" | "assistant", "content": str}, optionally beginning
    with one "system" message and ending with a user's. Past assistant messages keep their value line: their own
    "attributes" where given, the requested ones otherwise. Attributes may come in any order; those left out get
    the schema's default.

    Raises:
        InputError: unknown attribute (the nearest is named), value out of range, malformed messages, or a server
            whose model does not respond at values.
        ServerError: the server is down, timed out or answered with an error.
    """
    servers = connect(endpoint)
    served = servers.require_format(STEER)
    return respond(servers, served, [(messages, attributes, system)], sampling or Sampling())[0]


def connect(endpoint: str | ServerPool, timeout_s: float = 600.0, retries: int = 3) -> ServerPool:
    """What to ask for "host:port"."""
    if isinstance(endpoint, ServerPool):
        return endpoint
    host, _, port = endpoint.removeprefix("http://").rstrip("/").rpartition(":")
    if not host or not port.isdigit():
        raise InputError(f"endpoint {endpoint!r} is not host:port, such as 127.0.0.1:1427")
    return ServerPool([(host, int(port))], timeout_s, retries)


Request = tuple["str | Sequence[Mapping[str, object]]", Mapping[str, "int | str"], str]


def respond(
    servers: ServerPool, served: SteerLMFormat, requests: Sequence[Request], sampling: Sampling
) -> list[SteeredResponse]:
    """Responses to several (messages, attributes, system), asked for in one HTTP request."""
    asked = [_question(served, request) for request in requests]
    texts = _texts(servers, served, [prompt for _, prompt in asked], sampling)
    return [SteeredResponse(text, line, prompt) for text, (line, prompt) in zip(texts, asked, strict=True)]


def _question(served: SteerLMFormat, request: Request) -> tuple[Attributes, str]:
    """The full line of requested attributes, and the prompt. Raises InputError."""
    messages, attributes, system = request
    line = served.schema.complete(attributes)
    return line, served.steering_prompt(conversation_of(messages, line, served.schema, system), line)


def _texts(
    servers: ServerPool, served: SteerLMFormat, prompts: Sequence[str], sampling: Sampling, home: int = 0
) -> list[str]:
    markers = [served.template.turn_start, served.template.label_start]
    generation = servers.generate(prompts, home, end_strings=markers, **sampling.body())
    return [served.template.response_text(completion) for completion in generation.completions]


def steer_file(
    input_file: str | Path,
    output_file: str | Path,
    attributes: Mapping[str, int | str],
    endpoint: str | ServerPool,
    batch_size: int,
    *,
    system: str = SYSTEM_PROMPT,
    sampling: Sampling | None = None,
    allow_rejected: bool = False,
) -> Done:
    """Respond to every record of a JSONL file, `batch_size` per request.

    A record has "prompt" or "messages", and may have "attributes" (they win over `attributes`) and "system". The
    output repeats it with "response" and "response_attributes", the full line used. `allow_rejected` completes it
    without the records that cannot be answered (they stay in the reject file).

    Raises:
        InputError, ServerError: as `steer`.
        IncompleteError: as `working_through`.
    """
    servers, sampling = connect(endpoint), sampling or Sampling()
    source, output = require_sound(input_file, output_file, servers, batch_size)
    served = servers.require_format(STEER)
    served.schema.complete(attributes)  # or every record would be at fault
    job = _Steering(servers, served, attributes, system, sampling)
    settings = {"attributes": dict(attributes), "system": system, **sampling.body()}
    done = Done(WORDS)
    with working_through(
        source, output, servers, served, job, settings, done, batch_size=batch_size, allow_rejected=allow_rejected
    ):
        return done


@dataclass
class _Asked:
    """A record in work."""

    line: RawLine
    attributes: Attributes
    prompt: str
    response: str = ""


class _Steering:
    """The job: every record gets a response at its attributes."""

    words = WORDS

    def __init__(
        self,
        servers: ServerPool,
        served: SteerLMFormat,
        attributes: Mapping[str, int | str],
        system: str,
        sampling: Sampling,
    ) -> None:
        self._servers = servers
        self._served = served
        self._attributes = attributes
        self._system = system
        self._sampling = sampling

    def begin(self, line: RawLine) -> _Asked:
        record = line.require_record()
        try:
            dump_record(record)
            return _Asked(line, *_question(self._served, _request(record, self._attributes, self._system)))
        except (InputError, ValueError, RecursionError) as err:
            raise RecordError(line.ref, str(err)) from err

    def order(self, item: _Asked) -> str:
        return item.prompt

    def ask(self, items: Sequence[_Asked]) -> None:
        home = zlib.crc32(items[0].prompt.encode())
        prompts = [item.prompt for item in items]
        for item, text in zip(items, _texts(self._servers, self._served, prompts, self._sampling, home), strict=True):
            item.response = text

    def finish(self, item: _Asked) -> tuple[Mapping[str, Any], Mapping[str, int]]:
        record = item.line.require_record()
        return {**record, "response": item.response, "response_attributes": item.attributes.line}, {}


def _request(record: Mapping[str, object], attributes: Mapping[str, int | str], system: str) -> Request:
    messages = record.get("messages", record.get("prompt"))
    own_attributes, own_system = record.get("attributes", {}), record.get("system", system)
    if not isinstance(messages, str | list) or not all(isinstance(message, str | Mapping) for message in messages):
        raise InputError(
            "wrong type: a record needs 'prompt', a string, or 'messages', a list of objects" + told_by_keys(record)
        )
    if not isinstance(own_attributes, Mapping) or not isinstance(own_system, str):
        raise InputError("wrong type: 'attributes' must be an object such as {\"quality\": 4}, and 'system' a string")
    return messages, {**attributes, **own_attributes}, own_system


def parse_attributes(text: str) -> dict[str, int | str]:
    """`quality:4,humor:0` as a mapping. Raises InputError saying which item is malformed."""
    try:
        return Attributes.parse(text).as_dict()
    except ValueError as err:
        raise InputError(f"--attributes {text!r}: {err}. Write it like quality:4,humor:0.") from err
