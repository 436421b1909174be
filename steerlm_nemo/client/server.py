"""HTTP client of one server: each call is one request. Whoever wants retries has a `ServerPool`, of one server too.

Two kinds of failure: the server could not answer now (down, time-out, 5xx, 429, an answer cut short), and the server
refused the request (4xx), which no retry can change.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from steerlm_nemo.errors import FormatMismatchError, InputError, ServerError
from steerlm_nemo.model_kind import MODEL_HEADER, SteerLMFormat, kinds_that


class RequestRefusedError(ServerError):
    """The server answered 4xx: this request will never succeed."""


class UnreachableError(ServerError):
    """Nobody answers at this address, or a server that says it is ending (503)."""


@dataclass(frozen=True)
class ServedLine:
    """A full attribute line, how many of its values overrule the model's own, illegal, first choice, and how sure the
    model was: per key that was not given `probabilities` of the legal values, `expected` (None for lang), `confidence`
    and `logprob`; None from a server that does not tell."""

    text: str
    num_overruled: int
    beliefs: dict[str, dict[str, Any]] | None


class Generation:
    """One answered `/generate` request: what each prompt was continued with, and the log-probabilities if asked."""

    def __init__(self, sentences: Sequence[str], answer: Any, where: str) -> None:
        if isinstance(answer, str):  # how NeMo's server, and ours in its compat mode, refuses a request
            raise RequestRefusedError(f"{where} refused the request: {answer}")
        texts = answer.get("sentences") if isinstance(answer, dict) else None
        if not isinstance(texts, list) or len(texts) != len(sentences):
            raise ServerError(f"{where} answered something other than {len(sentences)} sentences: {str(answer)[:200]}")
        for sentence, text in zip(sentences, texts, strict=True):
            if not isinstance(text, str) or not text.startswith(sentence):
                raise ServerError(f"{where} answered a sentence that does not begin with its prompt: {text!r:.200}")
        self.completions = [text[len(sentence) :] for sentence, text in zip(sentences, texts, strict=True)]
        self.token_ids: list[list[int]] = answer.get("token_ids")
        self.logprob: list[list[float]] | None = answer.get("logprob")


class ServerClient:
    """A server's address with time-out. One client may be shared by several threads.

    It asks one model: the one of which `format` first told. Every answer that tells of another is refused, whatever it
    answers; where an answer tells of none, the server is asked again before the answer counts.

    Where the environment has STEERLM_TOKEN, that token is sent.
    """

    def __init__(self, host: str, port: int, timeout_s: float = 600.0) -> None:
        self.where = f"http://{host}:{port}"
        self.num_requests = 0
        # Of the served model, once `format` has asked; None where the server is silent.
        self.identity: str | None = None
        self._met = False
        self._http = httpx.Client(
            base_url=self.where,
            timeout=httpx.Timeout(timeout_s, connect=min(timeout_s, 10.0)),
            limits=httpx.Limits(max_connections=None),
            headers={"Authorization": f"Bearer {token}"} if (token := os.environ.get("STEERLM_TOKEN")) else {},
            trust_env=False,  # a proxy meant for the internet must not stand between us and our own server
        )
        self._lock = threading.Lock()

    def generate(self, sentences: Sequence[str], **settings: Any) -> Generation:
        """Continue every sentence. `settings` are keys of `PUT /generate`.

        Raises:
            RequestRefusedError: the server says the request is wrong.
            ServerError: no answer.
            InputError: another model answers than the one whose `format` was asked for.
        """
        response = self._send("PUT", "/generate", {"sentences": list(sentences), **settings})
        self._require_model(response)
        return Generation(sentences, self._content(response), self.where)

    def attribute_lines(
        self, prompts: Sequence[str], given: Sequence[Mapping[str, str | int]] | None = None, *, beliefs: bool = True
    ) -> list[ServedLine] | None:
        """A full line per prompt. `given` are the values that are known of each line.

        Without `beliefs` the answer is a tenth as long.

        None where the server does not have this call, as NeMo's own.

        Raises:
            RequestRefusedError, ServerError, InputError: as `generate`.
        """
        body: dict[str, Any] = {"prompts": list(prompts)}
        if given is not None and any(given):
            body["given"] = [dict(known) for known in given]
        if not beliefs:
            body["beliefs"] = False

        response = self._send("POST", "/v1/attribute_lines", body)
        self._require_model(response)
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        answer = self._content(response)
        try:
            told = answer.get("attributes") or [None] * len(prompts)
            found = [ServedLine(*row) for row in zip(answer["lines"], answer["num_overruled"], told, strict=True)]
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise ServerError(f"{self.where}/v1/attribute_lines answered something else: {answer!r:.200}") from err
        if len(found) != len(prompts):
            raise ServerError(f"{self.where} answered {len(found)} lines for {len(prompts)} prompts")
        return found

    def is_ready(self) -> bool:
        """Does GET /health answer now? One try."""
        try:
            return bool(self._json("GET", "/health").get("ready"))
        except (ServerError, AttributeError):
            return False

    def format(self) -> SteerLMFormat | None:
        """The served model's template and schema; None if its checkpoint has none, or the server does not know.

        The first call sets `identity`.

        Raises:
            ServerError: the server cannot be reached.
            InputError: it serves another model than at the first call.
        """
        content, told = self._tells()
        with self._lock:
            if not self._met:
                self.identity, self._met = told, True
        self._require_identity(told)
        if content is None:
            return None
        try:
            return SteerLMFormat.from_dict(content)
        except FormatMismatchError as err:
            raise ServerError(f"{self.where}/v1/attributes did not answer with a SteerLM format: {err}") from err

    def _tells(self) -> tuple[Any, str | None]:
        """The format as it was answered, and the identity; None for what the server does not tell."""
        response = self._send("GET", "/v1/attributes")
        if response.status_code == httpx.codes.NOT_FOUND:
            return None, response.headers.get(MODEL_HEADER)
        content = self._content(response)
        return content, (content.get("identity") or None) if isinstance(content, dict) else None

    def _require_model(self, response: httpx.Response) -> None:
        """Raise InputError if the answer, a refusal too, is not of the model that `format` first told of."""
        told = response.headers.get(MODEL_HEADER)
        if told is None and self.identity is not None:
            # An older server of ours, or one behind a proxy that keeps headers to itself: the model before this answer
            # and the one after it are the same.
            told = _model_of(response) or self._tells()[1]
        self._require_identity(told)

    def _require_identity(self, told: str | None) -> None:
        if self._met and told != self.identity:
            raise InputError(
                f"{self.where} served {named(self.identity)} when this run began and serves "
                f"{told or 'a model that its server does not name'} now. One "
                "file is made by one model: serve the first again and run the same command."
            )

    def close(self) -> None:
        self._http.close()

    def _json(self, method: str, path: str, body: Any = None) -> Any:
        return self._content(self._send(method, path, body))

    def _send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        with self._lock:
            self.num_requests += 1
        try:
            response = self._http.request(method, path, json=body)
        except (httpx.ConnectError, httpx.ConnectTimeout) as err:
            raise UnreachableError(
                f"no server answers at {self.where} ({err}). Start it, or give its host and port."
            ) from err
        except httpx.TimeoutException as err:
            raise ServerError(
                f"{self.where}{path} did not answer in time ({type(err).__name__}). Is the server overloaded? "
                "A longer time-out or a smaller batch may help."
            ) from err
        except httpx.HTTPError as err:
            raise ServerError(f"{self.where}{path}: the connection broke ({err or type(err).__name__})") from err
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise UnreachableError(f"{self.where}{path} answered 503: {_message(response)}")
        if response.status_code >= 500 or response.status_code == httpx.codes.TOO_MANY_REQUESTS:
            raise ServerError(f"{self.where}{path} answered {response.status_code}: {_message(response)}")
        return response

    def _content(self, response: httpx.Response) -> Any:
        path = response.request.url.path
        if response.status_code != httpx.codes.OK:
            hint = " Set STEERLM_TOKEN." if response.status_code == httpx.codes.UNAUTHORIZED else ""
            raise RequestRefusedError(f"{self.where}{path} answered {response.status_code}: {_message(response)}{hint}")
        try:
            return response.json()
        except ValueError as err:
            raise ServerError(
                f"{self.where}{path} answered something that is not JSON: {response.text[:200]!r}"
            ) from err


def require_ability(served: SteerLMFormat | None, ability: str, where: str) -> SteerLMFormat:
    """The format, if it is of a model that can do this. Raises InputError naming what is served instead."""
    wanted = " or ".join(f"{kind.title} ({kind.name})" for kind in kinds_that(ability))
    if served is None:
        raise InputError(
            f"the model at {where} carries no template and attributes: it is not a SteerLM checkpoint. "
            f"Serve {wanted}: a .nemo made by the training scripts here."
        )
    if ability not in served.kind.abilities:
        raise InputError(f"the model at {where} is {served.kind.title}; this needs {wanted}. Serve one of these.")
    return served


def named(identity: str | None) -> str:
    """A model in a sentence, by its identity."""
    return "a model that its server does not name" if identity is None else f"model {identity}"


def _model_of(response: httpx.Response) -> str | None:
    """What the body of POST /v1/attribute_lines says."""
    try:
        return response.json().get("model") or None
    except (ValueError, AttributeError):
        return None


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200] or "no message"
