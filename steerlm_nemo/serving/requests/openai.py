"""What OpenAI's clients send: every key is honoured, or refused by name where its value is not neutral."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

from steerlm_nemo.engine.protocol import MAX_TOP_LOGPROBS
from steerlm_nemo.serving.requests.body import MAX_INTEGER, Body, Count, OneError, Text, few_keys, refuse
from steerlm_nemo.serving.requests.neutral import (
    CHAT,
    GENERATION,
    MESSAGE,
    PART,
    STREAM_OPTIONS,
    WITHOUT_ATTRIBUTES,
    Neutral,
)

Positive = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
NumTop = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
StopString = Annotated[str, Field(min_length=1, max_length=500)]
Attributes = Annotated[
    dict[Text, Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)] | Annotated[str, Field(max_length=40)]],
    Field(max_length=100),
    few_keys(100),  # no model has as many; a million would only take time to refuse
]


class TextPart(Body):
    neutral = PART

    type: Literal["text"] = "text"
    text: Text

    @model_validator(mode="before")
    @classmethod
    def _text_first(cls, value: Any) -> Any:
        """Before the keys that a part of another type has."""
        if isinstance(value, dict) and isinstance(kind := value.get("type"), str) and kind != "text":
            row = Neutral(("text",), "text is all that is read and written")
            raise PydanticCustomError("not_neutral", "refused", {"key": "type", "row": row, "value": kind})
        return value


class Message(Body):
    neutral = MESSAGE

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], OneError]
    attributes: Annotated[
        Attributes | None, Field(description="What a past response has; without it, the requested ones.")
    ] = None

    def plain(self) -> dict[str, object]:
        """As `steerlm_nemo.messages` takes it."""
        return {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text(),
            "attributes": self.attributes,
        }

    def text(self) -> str:
        """The parts of the content, one after the other."""
        content = self.content or ""
        return content if isinstance(content, str) else "".join(part.text for part in content)


class ToolFunction(Body):
    name: Text
    arguments: Annotated[Text | dict[Text, Any], Field(description="A JSON object, or one in a string.")] = "{}"


class ToolCall(Body):
    id: Text | None = None
    type: Literal["function"] = "function"
    function: ToolFunction


OwnContent = Annotated[
    Text | Annotated[list[TextPart], OneError] | None, Field(description="May be left out beside tool_calls.")
]


class OwnMessage(Message):
    """A message for a model's own chat template, which may know tools."""

    neutral = MESSAGE | WITHOUT_ATTRIBUTES

    role: Literal["system", "developer", "user", "assistant", "tool"]  # type: ignore[assignment]
    content: OwnContent = None  # type: ignore[assignment]
    attributes: None = None  # type: ignore[assignment]
    name: Annotated[Text | None, Field(description="For the template to use.")] = None
    tool_calls: Annotated[list[ToolCall] | None, OneError] = None
    tool_call_id: Text | None = None
    reasoning_content: Annotated[Text | None, Field(description="For the template to use.")] = None

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.content is None and not self.tool_calls:
            refuse("a message needs content, or the assistant's tool_calls", "messages")
        if self.tool_calls and self.role != "assistant":
            refuse(f"tool_calls are the assistant's; a {self.role} message has none", "messages")
        return self


class StreamOptions(Body):
    neutral = STREAM_OPTIONS

    include_usage: bool = False
    continuous_usage_stats: Annotated[bool, Field(description="vLLM's. Usage so far in every chunk.")] = False

    @property
    def asks(self) -> bool:
        """For anything."""
        return self.include_usage or self.continuous_usage_stats


class SampledRequest(Body):
    """What both of OpenAI's requests have."""

    neutral = GENERATION

    model: Annotated[
        Text | None, Field(description="As GET /v1/models names it; left out: the one that is served.")
    ] = None
    n: Positive = 1
    temperature: Annotated[float, Field(ge=0, le=2, description="0: greedy.")] = 1
    top_p: Annotated[float, Field(ge=0, le=1, description="0: greedy.")] = 1
    top_k: Annotated[int, Field(ge=-1, le=MAX_INTEGER, description="Not OpenAI's. 0 and -1: off.")] = 0
    min_p: Annotated[float, Field(ge=0, le=1, description="Not OpenAI's. 0: off.")] = 0
    repetition_penalty: Annotated[float, Field(ge=1, le=100, description="Not OpenAI's. 1: off.")] = 1
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0
    logit_bias: Annotated[
        dict[Text, Annotated[float, Field(ge=-100, le=100)]],
        Field(max_length=1024, description="By token id, what is added to the logit."),
        few_keys(1024),
    ] = {}  # noqa: RUF012 - pydantic copies it
    min_tokens: Annotated[Count, Field(description="Not OpenAI's. Nothing ends a text before.")] = 0
    ignore_eos: Annotated[
        bool, Field(description="Not OpenAI's. What ends a turn of the model is a token like others.")
    ] = False
    seed: Annotated[int, Field(ge=-MAX_INTEGER - 1, le=MAX_INTEGER)] | None = None
    stop: Annotated[
        StopString | Annotated[list[StopString], Field(max_length=16)] | None,
        Field(description="Not part of the text; found inside tokens, too."),
    ] = None
    stop_token_ids: Annotated[list[Count], Field(max_length=256, description="Not OpenAI's."), OneError] = []  # noqa: RUF012
    include_stop_str_in_output: Annotated[
        bool, Field(description="Not OpenAI's. The text ends with the stop string or stop token id.")
    ] = False
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and self.stream_options.asks and not self.stream:
            refuse("stream_options needs stream: true", "stream_options")
        return self

    @staticmethod
    def _require_not_below(least: int, most: int | None) -> None:
        if most is not None and least > most:
            refuse(f"min_tokens is {least}, but max_tokens {most}; it must not be larger", "min_tokens")

    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(SampledRequest):
    neutral = GENERATION | CHAT

    messages: Annotated[list[Message], Field(min_length=1), OneError]
    attributes: Annotated[
        Attributes | None,
        Field(description="Requested values, in any order; the schema's default for every attribute left out."),
    ] = None
    max_completion_tokens: Annotated[
        Positive | None, Field(description="Left out: as many as the context has room for.")
    ] = None
    max_tokens: Annotated[Positive | None, Field(description="The old name of max_completion_tokens.")] = None
    continue_final_message: Annotated[
        bool, Field(description="Not OpenAI's. The response goes on with the last message, the assistant's.")
    ] = False
    add_generation_prompt: Annotated[
        bool | None, Field(description="Not OpenAI's. Left out: true, unless continue_final_message is.")
    ] = None
    logprobs: bool = False
    top_logprobs: NumTop | None = None

    @model_validator(mode="after")
    def _top_of_what(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            refuse(f"top_logprobs {self.top_logprobs} needs logprobs: true", "top_logprobs")
        return self

    @model_validator(mode="after")
    def _no_more_than_most(self) -> Self:
        most = min(
            (limit for limit in (self.max_completion_tokens, self.max_tokens) if limit is not None), default=None
        )
        self._require_not_below(self.min_tokens, most)
        return self

    @model_validator(mode="after")
    def _one_way_to_go_on(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            refuse("continue_final_message and add_generation_prompt cannot both be true", "continue_final_message")
        return self

    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


_OURS = ("messages", "tools", "documents", "add_generation_prompt")


class OwnChatRequest(ChatRequest):
    """A chat with a model that brings its own chat template, and no attributes."""

    neutral = GENERATION | CHAT | WITHOUT_ATTRIBUTES

    messages: Annotated[list[OwnMessage], Field(min_length=1), OneError]  # type: ignore[assignment]
    attributes: None = None  # type: ignore[assignment]
    chat_template_kwargs: Annotated[
        dict[Text, Any] | None,
        Field(max_length=100, description="Not OpenAI's. Further variables of the template, such as enable_thinking."),
        few_keys(100),
    ] = None

    @model_validator(mode="after")
    def _variables_of_its_own(self) -> Self:
        if taken := [name for name in _OURS if name in (self.chat_template_kwargs or {})]:
            refuse(f"chat_template_kwargs.{taken[0]} is not for the client to set", "chat_template_kwargs")
        return self


def _none_if_false(value: int | None) -> int | None:
    return None if value is False else value


TokenIds = Annotated[list[Count], Field(min_length=1), OneError]


class CompletionRequest(SampledRequest):
    prompt: Annotated[
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1), OneError]
        | Annotated[list[TokenIds], Field(min_length=1), OneError],
        Field(union_mode="left_to_right"),
    ]
    max_tokens: Annotated[Count, Field(description="0: nothing, which with echo and logprobs scores the prompt.")] = 16
    logprobs: Annotated[NumTop | Literal[False] | None, AfterValidator(_none_if_false)] = None
    echo: Annotated[bool, Field(description="The text begins with the prompt, and logprobs with the prompt's.")] = False
    add_BOS: Annotated[bool, Field(description="Not OpenAI's. The prompt begins with the beginning-of-text token.")] = (
        False
    )
    best_of: Annotated[Positive | None, Field(description="As n, or 1.")] = None

    @model_validator(mode="after")
    def _no_more_than_most(self) -> Self:
        self._require_not_below(self.min_tokens, self.max_tokens)
        if self.best_of not in (None, 1, self.n):
            why = GENERATION["best_of"].why
            refuse(f"best_of {self.best_of} is not supported: {why}; accepted: 1 or n, which is {self.n}", "best_of")
        return self

    def prompts(self) -> list[str] | list[list[int]] | list[str | list[int]]:
        """One or more texts, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # type: ignore[list-item, return-value]
