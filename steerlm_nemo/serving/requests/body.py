"""What all request models share: how strict they are, what a refusal says, and how null counts.

A route has one model. It checks the body, and its JSON Schema is what GET /openapi.json shows and what a refusal
describes: what is documented is what is checked.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema
from typing_extensions import Self

from steerlm_nemo.errors import SteerLMError

MAX_INTEGER = 2**63 - 1

# Any length bound makes pydantic look into a string, which finds the lone surrogates that JSON can spell and no
# tokenizer takes.
Text = Annotated[str, Field(min_length=0)]
Count = Annotated[int, Field(ge=0, le=MAX_INTEGER)]


class BadRequest(SteerLMError):
    """A request the client has to change. `always_400`: NeMo's server, too, answers this one with status 400.

    `param` is the key at fault and `code` a word for programs, where OpenAI's clients expect them.
    """

    def __init__(
        self,
        message: str,
        *,
        always_400: bool = False,
        param: str | None = None,
        code: str | None = None,
        status: int = 400,
    ) -> None:
        super().__init__(message)
        self.always_400 = always_400
        self.status = status
        self.param = param
        self.code = code


class Strict(BaseModel):
    """Nothing is coerced, no key unknown. `description`s are for readers of the document."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Body(Strict):
    """A body of /v1/ or an object in one: null counts as left out."""

    @model_validator(mode="before")
    @classmethod
    def _known_and_given(cls, value: Any) -> Any:
        """Before anything else, so that a misspelt key is named and not what is missing for it."""
        if not isinstance(value, dict):
            return value
        known = _keys(cls)
        given = {key: item for key, item in value.items() if item is not None} if None in value.values() else value
        if not given.keys() <= known.keys():
            key = next(key for key in given if key not in known)
            near = difflib.get_close_matches(key[:100], known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise PydanticCustomError("unknown_key", "unknown", {"key": shown(key), "hint": hint})
        return given

    @classmethod
    def from_json(cls, body: Any, max_prompts: int) -> Self:
        """The checked body. Raises BadRequest: the first thing in it that has to change."""
        try:
            return cls.model_validate(body, context={"max_prompts": max_prompts})
        except ValidationError as err:
            raise _refusal(cls, body, err) from None

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        told = handler(schema)
        own = handler.resolve_ref_schema(told)
        required = own.get("required", ())
        properties = own["properties"]
        own["properties"] = {key: part if key in required else _or_null(part) for key, part in properties.items()}
        if own.get("additionalProperties") is False:
            own["additionalProperties"] = {"type": "null"}
        return told


@cache
def _keys(model: type[Body]) -> dict[str, None]:
    """Those that must be there first."""
    fields = model.model_fields
    return dict.fromkeys(sorted(fields, key=lambda name: not fields[name].is_required()))


def _or_null(part: JsonSchemaValue) -> JsonSchemaValue:
    aside = {key: value for key, value in part.items() if key in ("description", "default", "title")}
    rest = {key: value for key, value in part.items() if key not in aside}
    options = rest.get("anyOf", [rest])
    if not rest or {"type": "null"} in options:
        return part
    return {"anyOf": [*options, {"type": "null"}], **aside}


@dataclass(frozen=True)
class Only:
    """Annotates a key that is taken only where it asks for what happens anyway, as many programs spell it out."""

    value: Any

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {"enum": [self.value]}

    def _check(self, value: Any) -> Any:
        if value != self.value or isinstance(value, bool) != isinstance(self.value, bool):
            raise PydanticCustomError("only", "something else")
        return value


def _within_limit(value: Any, info: ValidationInfo) -> Any:
    most = (info.context or {})["max_prompts"]
    if isinstance(value, list) and len(value) > most:
        raise PydanticCustomError("too_many", "too many", {"found": len(value), "most": most})
    return value


# Of prompts, or what becomes prompts: no more than the server's http.max_prompts; said before they are looked into.
WithinLimit = BeforeValidator(_within_limit)
# A body of a million wrong items is refused for the first.
OneError = Field(fail_fast=True)


def _few(value: Any) -> Any:
    if isinstance(value, dict) and len(value) > 100:
        raise PydanticCustomError("too_many_keys", "too many")
    return value


# No model has a hundred attributes; a million would only take time to refuse.
FewKeys = BeforeValidator(_few)


def refuse(message: str, param: str) -> NoReturn:
    """In a validator: what keys mean together is wrong."""
    raise PydanticCustomError("refused", "refused", {"message": message, "param": param})


@cache
def _schema_of(model: type[Strict]) -> Mapping[str, Any]:
    return model.model_json_schema()


def _refusal(model: type[Body], body: Any, err: ValidationError) -> BadRequest:
    """The first error in words, with the path of its key, and what the document says must be there."""
    first = err.errors(include_url=False, include_input=False)[0]
    found = _Place(_schema_of(model), body).walk(first["loc"])
    where = found.where
    match first["type"]:
        case "refused":
            return BadRequest(first["ctx"]["message"], param=first["ctx"]["param"])
        case "too_many":
            most, number = first["ctx"]["most"], first["ctx"]["found"]
            return BadRequest(f"{where} has {number} entries; this server takes {most} per request", param=where)
        case "unknown_key" if found.is_whole:
            key, hint = first["ctx"]["key"], first["ctx"]["hint"]
            inside = f" in {where}" if where else ""
            return BadRequest(f"unknown key {key}{inside}; {hint}", param=key.strip("'"), code="unknown_key")
        case "missing" if found.is_whole:
            return BadRequest(f"{where} is missing; it must be {found.description()}", param=str(first["loc"][-1]))
        case "string_unicode" if isinstance(found.value, Mapping):
            return BadRequest(f"{where or 'the body'} has a key that is no valid Unicode", param=where)
    if not where:
        return BadRequest("the body must be a JSON object")
    return BadRequest(f"{where} must be {found.description()}, found {shown(found.value)}", param=where)


class _Place:
    """A value of a body and the schema that it has to fit, side by side."""

    def __init__(self, schema: Mapping[str, Any], value: Any) -> None:
        self._definitions = schema.get("$defs", {})
        self._schema, self.value, self.where = schema, value, ""
        self.is_whole = True  # the whole way was walked

    def walk(self, loc: Sequence[int | str]) -> _Place:
        """As far as there is one way to go; what fits none of several alternatives is told where they part."""
        for key in loc:
            options = self._options(self._schema)
            schema = options[0] if len(options) == 1 else {}
            if isinstance(key, int):
                part = schema.get("items")
                value = self.value[key] if isinstance(self.value, list) and key < len(self.value) else None
            else:
                others = schema.get("additionalProperties")
                there = self.value if isinstance(self.value, Mapping) else {}
                part = schema.get("properties", {}).get(key, others if key in there else None)
                value = there.get(key)
            if part is None:
                self.is_whole = False
                break
            self.where += f"[{key}]" if isinstance(key, int) else f".{key[:100]}" if self.where else key[:100]
            self._schema, self.value = part, value
        return self

    def description(self) -> str:
        return self._describe(self._schema)

    def _options(self, schema: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        if "$ref" in schema:
            schema = self._definitions[schema["$ref"].rpartition("/")[2]]
        return [
            option
            for part in schema.get("anyOf", [schema])
            for option in ([part] if part is schema else self._options(part))
            if option.get("type") != "null"
        ]

    def _describe(self, schema: Mapping[str, Any], plural: bool = False) -> str:
        options = self._options(schema)
        if len(options) != 1:
            return " or ".join(self._describe(option, plural) for option in options)
        (schema,) = options
        if "enum" in schema or "const" in schema:
            return " or ".join(shown(option, whole=True) for option in schema.get("enum", [schema.get("const")]))
        kind = schema.get("type", "object")
        words = _TYPES[kind][plural]
        if kind == "array":
            low, high = schema.get("minItems", 0), schema.get("maxItems")
            count = f" of {low} to {high}" if high is not None else f" of at least {low}" if low else " of"
            return words + count + " " + (self._describe(schema["items"], True) if schema.get("items") else "values")
        if "maxProperties" in schema:
            words += f" of at most {schema['maxProperties']} keys"
        if kind == "string" and "maxLength" in schema:
            return f"{words}, {schema.get('minLength', 0)} to {schema['maxLength']} characters long"
        if kind == "string" and schema.get("minLength"):
            return f"{words}, not empty"
        if kind in ("integer", "number"):
            return f"{words} from {schema['minimum']} to {schema['maximum']}"
        return words


_TYPES: dict[str, tuple[str, str]] = {  # singular, plural
    "boolean": ("true or false", "booleans"),
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("a string of valid Unicode", "strings of valid Unicode"),
    "array": ("a list", "lists"),
    "object": ("an object", "objects"),
}


def shown(value: Any, *, whole: bool = False) -> str:
    """A value as an error quotes it: short, whatever was sent."""
    if isinstance(value, (list, Mapping)) and value and not whole:
        return _TYPES["array" if isinstance(value, list) else "object"][0]
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
