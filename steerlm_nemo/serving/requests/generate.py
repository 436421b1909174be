"""The body of `PUT /generate`: keys, defaults, order of rules and messages of NeMo's text generation server.

Checked completely before the engine hears of it, so that a bad request cannot leave a rank waiting (D-18).
The reference answers a failed check with status 200 and a bare string; we raise BadRequest, and the API decides.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, NoReturn

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
)
from pydantic.json_schema import JsonSchemaValue, SkipJsonSchema
from pydantic_core import CoreSchema
from typing_extensions import Self

from steerlm_nemo.serving.requests.body import MAX_INTEGER, BadRequest, OneError, Strict, Text, WithinLimit, refuse
from steerlm_nemo.serving.requests.neutral import GENERATION, shown

_HUGE = 2**99  # larger numbers would overflow on the way; exact as a float, so that all sides agree where it begins
EOS_ALIAS = "<|endoftext|>"  # stands for eos with every tokenizer

_TASK_IDS = (
    "Input at 'sentences' must by a tuple of two tensors like:" + " " * 20 + "(context_tokens_tensor, "
    "context_length_tensor) if task ids are given"
)


@dataclass(frozen=True)
class Says:
    """What a key that breaks its rule is answered: the reference's words, which its clients show."""

    message: str


def _no_task_ids(value: Any) -> NoReturn:
    refuse(_TASK_IDS, "task_ids")


def _no_retrieval(value: int | None) -> int | None:
    if value:
        refuse(
            f"neighbors {value} is for retrieval (RETRO) models, which this server does not serve; accepted: 0",
            "neighbors",
        )
    return value


def _whole(value: Any) -> Any:
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Neighbors = Annotated[Annotated[int, Field(ge=0)] | None, Says("num of neighbors must be an integer no less than 0")]


class GenerateRequest(Strict):
    """A checked body. Every value has its type and range; nothing here depends on a model.

    The first broken rule counts, in the order of the fields, which is the reference's order of checking.
    """

    sentences: Annotated[list[Text], Field(min_length=1), OneError, WithinLimit]
    task_ids: SkipJsonSchema[Annotated[Any, BeforeValidator(_no_task_ids)]] = None
    tokens_to_generate: Annotated[int, Field(ge=1), Says("tokens_to_generate must be an integer greater than 0")] = 64
    all_probs: Annotated[bool, Says("all_probs must be a boolean value")] = False
    temperature: Annotated[
        float, Field(gt=0, le=100), Says("temperature must be a positive number less than or equal to 100.0")
    ] = 1.0
    add_BOS: Annotated[bool, Says("add_BOS must be a boolean value")] = False
    greedy: Annotated[bool, Says("greedy must be a boolean value")] = False
    top_k: Annotated[
        int, Field(ge=0, le=_HUGE), BeforeValidator(_whole), Says("top_k must be a positive integer number")
    ] = 0
    top_p: Annotated[float, Field(ge=0, le=1), Says("top_p must be a positive number less than or equal to 1.0")] = 0.9
    repetition_penalty: Annotated[
        float, Field(ge=1, le=_HUGE), Says("repetition_penalty must be a positive number no less than 1.0")
    ] = 1.0
    end_strings: Annotated[
        list[Annotated[str, Field(min_length=1)]],  # an empty one would end every row at once
        Field(default=[EOS_ALIAS]),
        OneError,
        Says("expect end_strings to be a list of strings"),
    ]
    min_tokens_to_generate: Annotated[
        int, Field(ge=0), Says("min_tokens_to_generate must be an integer no less than 0")
    ] = 0
    min_tokens: Annotated[
        int,
        Field(ge=0, description="vLLM's. Nothing ends a text before, end strings neither."),
        Says("min_tokens must be an integer no less than 0"),
    ] = 0
    ignore_eos: Annotated[
        bool, Field(description="vLLM's. eos is a token like others."), Says("ignore_eos must be a boolean value")
    ] = False
    neighbors: Annotated[
        _Neighbors,
        AfterValidator(_no_retrieval),
        WithJsonSchema({"enum": [None, 0], "description": "Of retrieval models, which are not served."}),
    ] = None
    compute_logprob: Annotated[bool, Says("compute_logprob must be a boolean value")] = False
    random_seed: Annotated[
        Annotated[int, Field(ge=0, le=MAX_INTEGER)] | None,
        Says("random_seed must be a positive integer number or None"),
    ] = None

    @classmethod
    def from_json(cls, body: Any, max_prompts: int) -> Self:
        """Raises BadRequest: the first rule broken."""
        if not isinstance(body, Mapping):
            raise BadRequest("the body must be a JSON object with the key 'sentences'")
        if cls.model_config.get("extra") == "forbid":
            body = cls._without_neutral(body)
        try:
            return cls.model_validate(body, context={"max_prompts": max_prompts})
        except ValidationError as err:
            raise cls._refusal(err) from None

    @classmethod
    def _without_neutral(cls, body: Mapping[str, Any]) -> dict[str, Any]:
        """The keys of the model. Raises BadRequest: another one is unknown, or asks for something."""
        for key in sorted(body.keys() - cls.model_fields.keys()):
            if (row := GENERATION.get(key)) is None:
                known = [key for key in cls.model_fields if key != "task_ids"]
                near = difflib.get_close_matches(key[:100], [*known, *GENERATION], n=1, cutoff=0.75)
                hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known)}"
                raise BadRequest(f"The request key {key[:100]!r} is not allowed; {hint}")
            if body[key] is not None and not row.takes(body[key]):
                raise BadRequest(row.refusal(key, body[key]))
        return {key: value for key, value in body.items() if key in cls.model_fields}

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        told = handler(schema)
        if cls.model_config.get("extra") == "forbid":
            properties = handler.resolve_ref_schema(told)["properties"]
            properties |= {key: row.schema() for key, row in GENERATION.items() if key not in properties}
        return told

    @classmethod
    def _refusal(cls, err: ValidationError) -> BadRequest:
        first = err.errors(include_url=False)[0]
        key, *place = first["loc"]
        if first["type"] == "refused":
            return BadRequest(first["ctx"]["message"])
        if key != "sentences":
            words = next(word.message for word in cls.model_fields[str(key)].metadata if isinstance(word, Says))
            return BadRequest(cls._with_value(words, first["input"]))
        if first["type"] == "missing":
            return BadRequest("the key 'sentences' is missing; it must be a list of strings")
        if first["type"] == "too_many":
            return BadRequest(f"Maximum number of sentences is {first['ctx']['most']}", always_400=True)
        if place:
            return BadRequest(
                cls._with_value(f"sentences[{place[0]}] must be a string of valid Unicode", first["input"])
            )
        return BadRequest(cls._with_value("sentences must be a non-empty list of strings", first["input"]))

    @classmethod
    def _with_value(cls, words: str, value: Any) -> str:
        return f"{words}, found {shown(value)}"


class Nemo123Request(GenerateRequest):
    """As v1.23 of the reference takes it, with `compat=nemo1.23`: unknown keys and `neighbors` are ignored."""

    model_config = ConfigDict(extra="ignore")

    neighbors: _Neighbors = None

    @classmethod
    def _with_value(cls, words: str, value: Any) -> str:
        return words
