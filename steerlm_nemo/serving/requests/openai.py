"""What OpenAI's clients send: every key is honoured, or refused by name; those of `WithoutEffect` change no answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from steerlm_nemo.engine.protocol import MAX_TOP_LOGPROBS
from steerlm_nemo.serving.requests.body import MAX_INTEGER, Body, Count, FewKeys, OneError, Only, Text, refuse

Positive = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
NumTop = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)]
StopString = Annotated[str, Field(min_length=1, max_length=500)]
Attributes = Annotated[
    dict[Text, Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)] | Annotated[str, Field(max_length=40)]],
    Field(max_length=100),
    FewKeys,
]
Nothing = Annotated[Any, Only([])]


class TextPart(Body):
    type: Literal["text"]
    text: Text


class Message(Body):
    """A message of a conversation; the last keys are what one that an earlier answer brought has besides."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], OneError]
    attributes: Annotated[
        Attributes | None, Field(description="What a past response has; without it, the requested ones.")
    ] = None
    name: Annotated[Text | None, Field(description="Without effect.")] = None
    refusal: Nothing = None
    annotations: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Nothing = None
    reasoning: Nothing = None

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

    role: Literal["system", "developer", "user", "assistant", "tool"]  # type: ignore[assignment]
    content: OwnContent = None  # type: ignore[assignment]
    attributes: Annotated[Any, Only({})] = None
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
    include_usage: bool = False
    include_obfuscation: Annotated[bool, Field(description="Without effect.")] = False


class WithoutEffect(Body):
    """Keys that are accepted, whatever they hold."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None


class SampledRequest(WithoutEffect):
    """What both of OpenAI's requests have."""

    model: Annotated[
        Text | None, Field(description="As GET /v1/models names it; left out: the one that is served.")
    ] = None
    n: Positive = 1
    temperature: Annotated[float, Field(ge=0, le=2, description="0: greedy.")] = 1
    top_p: Annotated[float, Field(ge=0, le=1, description="0: greedy.")] = 1
    top_k: Annotated[Count, Field(description="Not OpenAI's. 0: off.")] = 0
    repetition_penalty: Annotated[float, Field(ge=1, le=100, description="Not OpenAI's. 1: off.")] = 1
    seed: Annotated[int, Field(ge=-MAX_INTEGER - 1, le=MAX_INTEGER)] | None = None
    stop: Annotated[
        StopString | Annotated[list[StopString], Field(max_length=16)] | None,
        Field(description="Not part of the text; found inside tokens, too."),
    ] = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[Any, Only(0)] = None
    presence_penalty: Annotated[Any, Only(0)] = None
    logit_bias: Annotated[Any, Only({})] = None

    @model_validator(mode="after")
    def _options_of_a_stream(self) -> Self:
        if self.stream_options is not None and not self.stream:
            refuse("stream_options needs stream: true", "stream_options")
        return self

    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(SampledRequest):
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
    response_format: Annotated[Any, Only({"type": "text"})] = None
    modalities: Annotated[Any, Only(["text"])] = None
    tools: Nothing = None
    tool_choice: Annotated[Any, Only("none")] = None

    @model_validator(mode="after")
    def _top_of_what(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            refuse("top_logprobs needs logprobs: true", "top_logprobs")
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

    messages: Annotated[list[OwnMessage], Field(min_length=1), OneError]  # type: ignore[assignment]
    attributes: Annotated[Any, Only({})] = None
    chat_template_kwargs: Annotated[
        dict[Text, Any] | None,
        Field(max_length=100, description="Not OpenAI's. Further variables of the template, such as enable_thinking."),
        FewKeys,
    ] = None

    @model_validator(mode="after")
    def _variables_of_its_own(self) -> Self:
        if taken := [name for name in _OURS if name in (self.chat_template_kwargs or {})]:
            refuse(f"chat_template_kwargs.{taken[0]} is not for the client to set", "chat_template_kwargs")
        return self


TokenIds = Annotated[list[Count], Field(min_length=1), OneError]


class CompletionRequest(SampledRequest):
    prompt: Annotated[
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1), OneError]
        | Annotated[list[TokenIds], Field(min_length=1), OneError],
        Field(union_mode="left_to_right"),
    ]
    max_tokens: Positive = 16
    logprobs: NumTop | None = None
    echo: Annotated[bool, Field(description="The text begins with the prompt; not together with logprobs.")] = False
    add_BOS: Annotated[bool, Field(description="Not OpenAI's. The prompt begins with the beginning-of-text token.")] = (
        False
    )
    best_of: Annotated[Any, Only(1)] = None
    suffix: Annotated[Any, Only("")] = None

    @model_validator(mode="after")
    def _echo_without_logprobs(self) -> Self:
        if self.echo and self.logprobs is not None:
            refuse("echo has no log-probabilities here; PUT /generate with compute_logprob has", "echo")
        return self

    def prompts(self) -> list[str] | list[list[int]] | list[str | list[int]]:
        """One or more texts, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return [self.prompt] if isinstance(self.prompt[0], int) else self.prompt  # type: ignore[list-item, return-value]
