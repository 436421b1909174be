"""What all request models share: how strict they are, what a refusal says, and how null counts.

A route has one model. It checks the body, and its JSON Schema is what GET /openapi.json shows and what a refusal
describes: what is documented is what is checked.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Annotated, Any, ClassVar, NoReturn

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError
from typing_extensions import Self

from steerlm_nemo.errors import SteerLMError
from steerlm_nemo.serving.requests.neutral import Neutral, shown

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
    """A body of /v1/ or an object in one: null counts as left out.

    `neutral` are keys besides the fields; see its module.
    """

    neutral: ClassVar[Mapping[str, Neutral]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_and_given(cls, value: Any) -> Any:
        """Before anything else, so that a misspelt key is named and not what is missing for it."""
        if not isinstance(value, dict):
            return value
        known = _keys(cls)
        given = {key: item for key, item in value.items() if item is not None} if None in value.values() else value
        if given.keys() <= known.keys():
            return given
        for key in (key for key in given if key not in known):
            if (row := cls.neutral.get(key)) is None:
                raise PydanticCustomError("unknown_key", "unknown", {"key": shown(key), "hint": nearest(key, cls)})
            if not row.takes(given[key]):
                raise PydanticCustomError("not_neutral", "refused", {"key": key, "row": row, "value": given[key]})
        return {key: item for key, item in given.items() if key in known}

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
        others = {key: row.schema() for key, row in cls.neutral.items() if key not in _keys(cls)}
        own["properties"] = {
            **{key: part if key in required else _or_null(part) for key, part in properties.items()},
            **others,
        }
        if own.get("additionalProperties") is False:
            own["additionalProperties"] = {"type": "null"}
        return told


@cache
def _keys(model: type[Body]) -> dict[str, None]:
    """Those that must be there first; none that only null fits, by which a model leaves out a key of its base."""
    fields = {name: field for name, field in model.model_fields.items() if field.annotation is not type(None)}
    return dict.fromkeys(sorted(fields, key=lambda name: not fields[name].is_required()))


def nearest(key: str, model: type[Body]) -> str:
    """What to tell who sent a key that nobody knows."""
    known = _keys(model)
    near = difflib.get_close_matches(key[:100], [*known, *model.neutral], n=1, cutoff=0.75)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"


def _or_null(part: JsonSchemaValue) -> JsonSchemaValue:
    aside = {key: value for key, value in part.items() if key in ("description", "default", "title")}
    rest = {key: value for key, value in part.items() if key not in aside}
    options = rest.get("anyOf", [rest])
    if not rest or {"type": "null"} in options:
        return part
    return {"anyOf": [*options, {"type": "null"}], **aside}


def _within_limit(value: Any, info: ValidationInfo) -> Any:
    most = (info.context or {})["max_prompts"]
    if isinstance(value, list) and len(value) > most:
        raise PydanticCustomError("too_many", "too many", {"found": len(value), "most": most})
    return value


# Of prompts, or what becomes prompts: no more than the server's http.max_prompts; said before they are looked into.
WithinLimit = BeforeValidator(_within_limit)
# A body of a million wrong items is refused for the first.
OneError = Field(fail_fast=True)


def few_keys(most: int) -> BeforeValidator:
    """Of an object: said before its values are looked into."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError("too_many_keys", "too many")
        return value

    return BeforeValidator(check)


def refuse(message: str, param: str) -> NoReturn:
    """In a validator: what keys mean together is wrong."""
    raise PydanticCustomError("refused", "refused", {"message": message, "param": param})


@cache
def _schema_of(model: type[Strict]) -> Mapping[str, Any]:
    return model.model_json_schema()


def _refusal(model: type[Body], body: Any, err: ValidationError) -> BadRequest:
    """The error that goes deepest into the first key at fault, in words: the value, and what is accepted there."""
    errors = err.errors(include_url=False, include_input=False)
    same_key = [error for error in errors if error["loc"][:1] == errors[0]["loc"][:1]]
    ways = [error["loc"] for error in same_key]
    places = [_Place(_schema_of(model), body).walk(way, ways) for way in ways]
    # What fits none of several alternatives has errors of each: those of the one that was meant go deepest.
    error, found = max(zip(same_key, places, strict=True), key=lambda pair: (pair[1].is_whole, pair[1].depth))
    where, context = found.where, error.get("ctx", {})
    match error["type"]:
        case "refused":
            return BadRequest(context["message"], param=context["param"])
        case "not_neutral" if found.is_whole:
            path = f"{where}.{context['key']}" if where else context["key"]
            return BadRequest(context["row"].refusal(path, context["value"]), param=path)
        case "too_many":
            most, number = context["most"], context["found"]
            return BadRequest(f"{where} has {number} entries; this server takes {most} per request", param=where)
        case "unknown_key" if found.is_whole:
            key, hint = context["key"], context["hint"]
            inside = f" in {where}" if where else ""
            return BadRequest(f"unknown key {key}{inside}; {hint}", param=key.strip("'"), code="unknown_key")
        case "missing" if found.is_whole:
            return BadRequest(f"{where} is missing; it must be {found.description()}", param=str(error["loc"][-1]))
        case "string_unicode" if isinstance(found.value, Mapping):
            return BadRequest(f"{where or 'the body'} has a key that is no valid Unicode", param=where)
    if not where:
        return BadRequest("the body must be a JSON object")
    if accepted := found.accepted():
        return BadRequest(f"{where} {shown(found.value)} is not supported; accepted: {accepted}", param=where)
    return BadRequest(f"{where} must be {found.description()}, found {shown(found.value)}", param=where)


class _Place:
    """A value of a body and the schema that it has to fit, side by side."""

    def __init__(self, schema: Mapping[str, Any], value: Any) -> None:
        self._definitions = schema.get("$defs", {})
        self._schema, self.value, self.where = schema, value, ""
        self.is_whole = True  # the whole way was walked
        self.depth = 0

    def walk(self, way: Sequence[int | str], ways: Sequence[Sequence[int | str]]) -> _Place:
        """As far as it is the way of what was meant: of several alternatives, the one that the value is like.

        `ways` are those of all errors. An alternative has a name in them; they come in the order of the schema.
        """
        for n, key in enumerate(way):
            options = self._options(self._schema)
            if len(options) > 1:
                names = list(dict.fromkeys(other[n] for other in ways if other[:n] == way[:n] and len(other) > n))
                like = self._like(self.value, options)
                if len(like) != 1 or options.index(like[0]) != names.index(key):
                    self.is_whole = False
                    break
                if n + 1 < len(way) or not _values(like[0]):
                    self._schema = like[0]
                continue
            schema = options[0]
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
            self.depth += 1
        return self

    def accepted(self) -> str:
        """The values that can stand here, where the schema lists them."""
        return self._describe(self._schema) if all(map(_values, self._options(self._schema))) else ""

    def _like(self, value: Any, options: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Those of the value's JSON type; of several kinds of lists, those of its first item's."""
        like = [
            option
            for option in options
            if isinstance(value, _CLASSES[option.get("type", "object")])
            and isinstance(value, bool) == (option.get("type") == "boolean")
        ]
        if len(like) < 2 or not isinstance(value, list) or not value:
            return like
        return [option for option in like if self._like(value[0], self._options(option["items"]))]

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
        if values := _values(schema):
            return " or ".join(map(shown, values))
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


def _values(schema: Mapping[str, Any]) -> list[Any]:
    """Those that it lists, if it does."""
    return schema["enum"] if "enum" in schema else [schema["const"]] if "const" in schema else []


_TYPES: dict[str, tuple[str, str]] = {  # singular, plural
    "boolean": ("true or false", "booleans"),
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("a string of valid Unicode", "strings of valid Unicode"),
    "array": ("a list", "lists"),
    "object": ("an object", "objects"),
}
_CLASSES: dict[str, type | tuple[type, ...]] = {
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "string": str,
    "array": list,
    "object": Mapping,
}
