"""What a value model is asked: attributes of conversations, and attribute lines after prompts."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator
from typing_extensions import Self

from steerlm_nemo.conversation import RecordType
from steerlm_nemo.serving.requests.body import Body, OneError, Strict, Text, WithinLimit
from steerlm_nemo.serving.requests.openai import Attributes, Message


class Conversation(Strict):
    """A chat record as in training files, or messages; whatever else it holds comes back as it is."""

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[Message], Field(min_length=1), OneError] | None = None
    _sent: dict[str, Any] = PrivateAttr()

    @model_validator(mode="wrap")
    @classmethod
    def _keep(cls, value: Any, make: ModelWrapValidatorHandler[Self]) -> Self:
        made = make(value)
        made._sent = value
        return made

    @property
    def sent(self) -> dict[str, Any]:
        """The JSON object that it was."""
        return self._sent


class AnnotateRequest(Body):
    conversations: Annotated[list[Conversation], Field(min_length=1), OneError, WithinLimit]
    turns: Literal["assistant", "all"] = "assistant"
    only_missing: Annotated[bool, Field(description="Keep the values that people gave.")] = False
    soft: Annotated[
        bool, Field(description="Tell expected value, confidence and probabilities of every chosen value.")
    ] = False
    output_type: Literal["keep"] | RecordType = "keep"


class AttributeLinesRequest(Body):
    prompts: Annotated[
        list[Text], Field(min_length=1, description="Text up to and with the label marker."), OneError, WithinLimit
    ]
    given: Annotated[
        list[Attributes | None] | None,
        Field(description="Per prompt the values that are known: they are forced, and the others chosen after them."),
        OneError,
    ] = None
    beliefs: Annotated[bool, Field(description="false leaves `attributes` out of the answer.")] = True
