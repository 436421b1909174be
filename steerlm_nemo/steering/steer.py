"""Asking a SteerLM model for a response at requested attribute values (SteerLM, arXiv:2310.05344, step 3).

The prompt is built by the template the model was trained with, fetched from its server, so its bytes are a prefix
of training text (the tutorial's own client differs in five places, D-31). The response is what follows the prompt
as it was sent (D-32), without its end marker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.client.pool import ServerPool
from steerlm_nemo.conversation import SYSTEM_PROMPT
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.messages import conversation_of
from steerlm_nemo.model_kind import CHAT, SteerLMFormat
from steerlm_nemo.outputs import require_writable
from steerlm_nemo.records import atomic_output, dump_record, read_records


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
    served = servers.require_format(CHAT)
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
    lines = [served.schema.complete(attributes) for _, attributes, _ in requests]
    prompts = [
        served.steering_prompt(conversation_of(messages, line, served.schema, system), line)
        for (messages, _, system), line in zip(requests, lines, strict=True)
    ]
    markers = [served.template.turn_start, served.template.label_start]
    generation = servers.generate(prompts, end_strings=markers, **sampling.body())
    return [
        SteeredResponse(served.template.response_text(completion), line, prompt)
        for completion, line, prompt in zip(generation.completions, lines, prompts, strict=True)
    ]


def steer_file(
    input_file: str | Path,
    output_file: str | Path,
    attributes: Mapping[str, int | str],
    endpoint: str | ServerPool,
    batch_size: int,
    *,
    system: str = SYSTEM_PROMPT,
    sampling: Sampling | None = None,
) -> int:
    """Respond to every record of a JSONL file; returns how many.

    A record has "prompt" or "messages", and may have "attributes" (they win over `attributes`) and "system". The
    output repeats it with "response" and "response_attributes", the full line used. Every record is checked before
    the first is asked for, and the output appears when all are answered.

    Raises:
        RecordError: a record cannot be used; the message starts with file:line.
        InputError, ServerError: as `steer`.
    """
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, found {batch_size}")
    require_writable(output_file)
    records = list(read_records(input_file))
    servers = connect(endpoint)
    served = servers.require_format(CHAT)
    requests = []
    for ref, record in records:
        try:
            requests.append(_request(record, attributes, system))
            messages, wanted, own_system = requests[-1]
            conversation_of(messages, served.schema.complete(wanted), served.schema, own_system)
        except InputError as err:
            raise RecordError(ref, str(err)) from err
    with atomic_output(output_file) as file, tqdm(total=len(records), unit="record", desc="steer") as progress:
        for start in range(0, len(records), batch_size):
            part = slice(start, start + batch_size)
            responses = respond(servers, served, requests[part], sampling or Sampling())
            for (_, record), response in zip(records[part], responses, strict=True):
                done = {**record, "response": response.text, "response_attributes": response.attributes.line}
                file.write(dump_record(done) + "\n")
            progress.update(len(responses))
    return len(records)


def _request(record: Mapping[str, object], attributes: Mapping[str, int | str], system: str) -> Request:
    messages = record.get("messages", record.get("prompt"))
    own_attributes, own_system = record.get("attributes", {}), record.get("system", system)
    if not isinstance(messages, str | list) or not all(isinstance(message, str | Mapping) for message in messages):
        raise InputError("a record needs 'prompt', a string, or 'messages', a list of objects")
    if not isinstance(own_attributes, Mapping) or not isinstance(own_system, str):
        raise InputError("'attributes' must be an object such as {\"quality\": 4}, and 'system' a string")
    return messages, {**attributes, **own_attributes}, own_system


def parse_attributes(text: str) -> dict[str, int | str]:
    """`quality:4,humor:0` as a mapping. Raises InputError saying which item is malformed."""
    try:
        return Attributes.parse(text).as_dict()
    except ValueError as err:
        raise InputError(f"--attributes {text!r}: {err}. Write it like quality:4,humor:0.") from err
