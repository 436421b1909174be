"""A chat as the text that the served model responds to: by the markers that it was trained on, or by its own template.

By markers, the prompt is the one of `scripts/steered_inference.py`, built by the same functions, so that it begins as
the model's training records do.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.conversation import SYSTEM_PROMPT
from steerlm_nemo.engine.protocol import ModelInfo
from steerlm_nemo.errors import InputError
from steerlm_nemo.messages import conversation_of
from steerlm_nemo.model_kind import CHAT, STEER, SteerLMFormat
from steerlm_nemo.own_template.own import OwnTemplate
from steerlm_nemo.own_template.renderer import Renderer, TooLongError
from steerlm_nemo.own_template.tokens import ChatTokens, breaker_for, broken_in, texts_in
from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.requests.openai import ChatRequest, OwnChatRequest, ToolCall
from steerlm_nemo.serving.samples.prompts import most_characters, no_room, prompt_ids


@dataclass(frozen=True)
class ChatPrompt:
    """What the model is given, and how its response ends."""

    ids: list[int]
    stop_ids: tuple[int, ...]  # beside those that end every text of the model
    markers: tuple[str, ...]  # texts that end a response
    ends: tuple[str, ...]  # what must not be shown before it is known that the text goes on after it
    trim: Callable[[str], str]  # what closed the response


class Chat(Protocol):
    template: ClassVar[Literal["markers", "own"]]  # how messages become a prompt, as GET /v1/models names it
    body: ClassVar[type[ChatRequest]]

    def line(self, request: ChatRequest) -> Attributes | None:
        """The attributes that the response is asked for at; None for a model that has none. Raises BadRequest."""
        ...

    def prompt(self, request: ChatRequest, line: Attributes | None) -> ChatPrompt:
        """Raises BadRequest."""
        ...

    def close(self) -> None: ...


def chat_of(info: ModelInfo) -> Chat | None:
    """How a model is chatted with; None where it is not.

    Raises:
        InputError: it brings a chat template that cannot be used.
    """
    if info.format is not None:
        return MarkerChat(info, info.format) if CHAT in info.format.kind.abilities else None
    return OwnChat(info, info.own_template) if info.own_template is not None else None


class MarkerChat:
    """A model that was fine-tuned here, at attributes or without."""

    template: ClassVar[Literal["markers", "own"]] = "markers"
    body: ClassVar[type[ChatRequest]] = ChatRequest

    def __init__(self, info: ModelInfo, served: SteerLMFormat) -> None:
        self._info = info
        self._served = served
        self._steers = STEER in served.kind.abilities

    def line(self, request: ChatRequest) -> Attributes | None:
        if self._steers:
            try:
                return self._served.schema.complete(request.attributes or {})
            except InputError as err:
                raise BadRequest(f"attributes: {err}", param="attributes") from err
        if request.attributes or any(message.attributes for message in request.messages):
            raise BadRequest(
                f"model {self._info.name} is {self._served.kind.title}: leave attributes out", param="attributes"
            )
        return None

    def prompt(self, request: ChatRequest, line: Attributes | None) -> ChatPrompt:
        for message in request.messages:
            if message.attributes is not None and message.role != "assistant":
                raise BadRequest(
                    f"a {message.role} message has no attributes; the requested ones are a key of the body",
                    param="messages",
                )
        messages = _with_one_system([message.plain() for message in request.messages])
        begun = self._begun(messages, request, line)
        try:
            conversation = conversation_of(messages, line, self._served.schema, SYSTEM_PROMPT)
        except InputError as err:
            raise BadRequest(str(err), param="messages") from err
        asked = self._served.plain_prompt(conversation)
        if line is not None:
            asked = self._served.steering_prompt(conversation, line)
        template = self._served.template
        markers = (template.turn_start, template.label_start)
        return ChatPrompt(
            prompt_ids(asked + template.sanitise(begun)[0], self._info, add_BOS=False, name="messages"),
            (),
            markers,
            (*markers, *(template.end_of_turn + marker for marker in markers)),
            template.response_text,
        )

    def _begun(self, messages: list[dict[str, object]], request: ChatRequest, line: Attributes | None) -> str:
        """What the response begins with: the last message, which is then no longer one, or nothing."""
        if not request.continue_final_message:
            if request.add_generation_prompt is False:
                raise BadRequest(
                    "add_generation_prompt: false needs continue_final_message: true; this model writes responses",
                    param="add_generation_prompt",
                )
            if messages[-1]["role"] == "assistant":
                raise BadRequest(
                    "the last message must be the user's; the model writes the assistant's, or goes on with it where "
                    "continue_final_message is true",
                    param="messages",
                )
            return ""
        last = messages.pop()
        if last["role"] != "assistant":
            raise BadRequest(
                f"continue_final_message is true, but the last message is the {last['role']}'s, not the assistant's",
                param="messages",
            )
        own = last["attributes"]
        if own and line is not None and self._served.schema.complete(own) != line:  # type: ignore[arg-type]
            raise BadRequest(
                f"messages[{len(messages)}].attributes: the message to continue is written at the requested "
                "attributes, which are a key of the body",
                param="messages",
            )
        return str(last["content"])

    def close(self) -> None:
        """There is nothing to end."""


def _with_one_system(messages: Sequence[dict[str, object]]) -> list[dict[str, object]]:
    """Training has one system prompt, in front: all system messages, wherever they stand, a line after the other.

    So do other servers of models with one system prompt.
    """
    systems = [message for message in messages if message["role"] == "system"]
    others = [message for message in messages if message["role"] != "system"]
    text = "\n".join(str(message["content"]) for message in systems)
    return [{**systems[0], "content": text}, *others] if systems else others


class OwnChat:
    """A model that brings a chat template of its own.

    Raises:
        InputError: the template cannot be used.
    """

    template: ClassVar[Literal["markers", "own"]] = "own"
    body: ClassVar[type[ChatRequest]] = OwnChatRequest

    def __init__(self, info: ModelInfo, own: OwnTemplate) -> None:
        self._info = info
        self._own = own
        self._tokens = ChatTokens(info.tokenizer, own.spaced)
        self._most = most_characters(info)
        self._renderer = Renderer(own.source)
        try:
            self._render([{"role": "user", "content": "Hi"}], True, {})
            self._end_ids = self._ends_of_turn()
        except InputError:
            self.close()
            raise

    def line(self, request: ChatRequest) -> Attributes | None:
        return None

    def prompt(self, request: ChatRequest, line: Attributes | None) -> ChatPrompt:
        assert isinstance(request, OwnChatRequest)
        sent = [self._message(request, index) for index in range(len(request.messages))]
        own_variables = request.chat_template_kwargs or {}
        breaker = breaker_for(texts_in([sent, own_variables, self._own.source]))
        messages, variables = broken_in([sent, own_variables], self._tokens, breaker)
        try:
            if request.continue_final_message:
                text = self._continued(messages, variables, breaker)
            else:
                text = self._render(messages, request.add_generation_prompt is not False, variables)
            self._require_all(messages, text, variables, breaker)
            ids = self._tokens.encode(text, breaker)
        except TooLongError as err:
            raise no_room("messages", f"more than {self._most} characters", self._info) from err
        except InputError as err:
            raise BadRequest(str(err), param="messages") from err
        return ChatPrompt(ids, self._end_ids, (), (), str)

    def close(self) -> None:
        self._renderer.close()

    def _render(self, messages: Sequence[Mapping[str, Any]], asks: bool, variables: Mapping[str, Any]) -> str:
        given = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": asks}
        return self._renderer.render({**self._own.names, **variables, **given}, self._most)

    def _ends_of_turn(self) -> tuple[int, ...]:
        """The special token that the template writes after a response, if any."""
        mark = breaker_for([self._own.source]) * 2
        try:
            text = self._render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}], False, {})
        except InputError:  # a template may know one turn only
            return ()
        end = self._tokens.first_special(text.rpartition(mark)[2])
        return () if end is None else (end,)

    def _message(self, request: OwnChatRequest, index: int) -> dict[str, Any]:
        """A message as templates know it: content is text, the arguments of a call are an object."""
        message = request.messages[index]
        made: dict[str, Any] = {"role": message.role, "content": message.text()}
        # Few templates know the newer name, and those that do not would leave the message out.
        if message.role == "developer" and "developer" not in self._own.source:
            made["role"] = "system"
        for key in ("name", "tool_call_id", "reasoning_content"):
            if (value := getattr(message, key)) is not None:
                made[key] = value
        if message.tool_calls:
            made["tool_calls"] = [
                _call(call, f"messages[{index}].tool_calls[{place}]") for place, call in enumerate(message.tool_calls)
            ]
        return made

    def _continued(self, messages: Sequence[dict[str, Any]], variables: Mapping[str, Any], breaker: str) -> str:
        """The conversation up to the end of its last message's text, as transformers cuts it."""
        # A blank after the mark tells whether the template keeps the blanks at the end of a message.
        mark = breaker * 2 + " "
        last = {**messages[-1], "content": messages[-1]["content"] + mark}
        text, found, after = self._render([*messages[:-1], last], False, variables).rpartition(breaker * 2)
        if not found:
            raise InputError("the model's chat template leaves the last message out, so that it cannot be continued")
        return text if after.startswith(" ") else text.rstrip()

    def _require_all(
        self, messages: Sequence[dict[str, Any]], text: str, variables: Mapping[str, Any], breaker: str
    ) -> None:
        """Raise InputError if the template leaves a message, or a call of one, out of the text.

        What stands in the text as it is needs no more. The others are marked and rendered again: templates may rewrite
        a message, such as one with the reasoning before it.
        """
        marked = []
        marks: dict[str, str] = {}
        for index, message in enumerate(messages):
            made = dict(message)
            if (content := message["content"].strip()) and content not in text:
                mark = f"{breaker}{index}{breaker}"
                made["content"] += mark
                marks[mark] = f"message {index} (role {message['role']!r}) out"
            calls = [dict(call) for call in message.get("tool_calls", ())]
            for place, call in enumerate(calls):
                if call["function"]["name"] not in text:
                    mark = f"{breaker}{index}.{place}{breaker}"
                    call["function"] = {**call["function"], "name": call["function"]["name"] + mark}
                    marks[mark] = f"the tool_calls of message {index} out"
            marked.append({**made, "tool_calls": calls} if calls else made)
        if not marks:
            return
        try:
            text = self._render(marked, False, variables)
        except InputError:  # it refuses what is marked, so it looks at it
            return
        if left_out := [what for mark, what in marks.items() if mark not in text]:
            raise InputError(f"the model's chat template leaves {left_out[0]}; put what it says into another message")


def _call(call: ToolCall, where: str) -> dict[str, Any]:
    """Raises BadRequest."""
    arguments: object = call.function.arguments
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as err:
            where += ".function.arguments"
            raise BadRequest(f"{where} must be a JSON object in a string: {err}", param=where) from err
    function = {"name": call.function.name, "arguments": arguments}
    return {**({} if call.id is None else {"id": call.id}), "type": "function", "function": function}
