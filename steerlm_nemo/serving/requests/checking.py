"""Request bodies checked against the JSON Schemas that GET /openapi.json shows: what is documented is what is checked.

Only the few words of JSON Schema that our bodies need are known here; every other one would be an error of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from steerlm_nemo.serving.requests.generate import BadRequest, is_text

Schema = Mapping[str, Any]

_TYPES: dict[str, tuple[str, str]] = {  # singular, plural
    "boolean": ("true or false", "booleans"),
    "integer": ("a whole number", "whole numbers"),
    "number": ("a number", "numbers"),
    "string": ("a string of valid Unicode", "strings of valid Unicode"),
    "array": ("a list", "lists"),
    "object": ("an object", "objects"),
    "null": ("null", "nulls"),
}


def read(body: Any, schema: Schema, path: str) -> dict[str, Any]:
    """The body with defaults filled in; a key that is null counts as left out.

    Raises:
        BadRequest: the first key that is unknown (the nearest is named), missing or not as the schema says.
    """
    if not isinstance(body, Mapping):
        raise BadRequest(f"the body of {path} must be a JSON object")
    known = schema["properties"]
    given = {key: value for key, value in body.items() if value is not None}
    check(given, schema, "")
    defaults = {key: part["default"] for key, part in known.items() if "default" in part}
    return {**dict.fromkeys(known), **defaults, **given}


def check(value: Any, schema: Schema, where: str) -> None:
    """Raise BadRequest naming the innermost value that does not fit."""
    if "anyOf" in schema:
        if not any(_fits(value, option, where) for option in schema["anyOf"]):
            raise _wrong(value, schema, where)
        return
    if not _fits_itself(value, schema):
        raise _wrong(value, schema, where)
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            check(item, schema["items"], f"{where}[{index}]")
    if isinstance(value, Mapping):
        properties = schema.get("properties", {})
        others = schema.get("additionalProperties", False)
        for key in value:
            if key not in properties and others is False:
                raise BadRequest(_unknown(key, properties, where), param=_shown(key).strip("'"), code="unknown_key")
        for key in schema.get("required", ()):
            if key not in value:
                raise BadRequest(f"{_join(where, key)} is missing; it must be {_describe(properties[key])}", param=key)
        for key, item in value.items():
            part = properties.get(key, others)
            is_left_out = item is None and key in properties and key not in schema.get("required", ())
            if part is not True and not is_left_out:
                check(item, part, _join(where, key))


def _fits(value: Any, schema: Schema, where: str) -> bool:
    try:
        check(value, schema, where)
    except BadRequest:
        return False
    return True


def _fits_itself(value: Any, schema: Schema) -> bool:
    """Without looking into lists and objects."""
    if "enum" in schema:
        return any(value == option and isinstance(value, bool) == isinstance(option, bool) for option in schema["enum"])
    match schema.get("type"):
        case None:
            return True
        case "boolean":
            return isinstance(value, bool)
        case "null":
            return value is None
        case "integer" | "number" as kind:
            is_number = isinstance(value, int if kind == "integer" else (int, float)) and not isinstance(value, bool)
            return is_number and schema["minimum"] <= value <= schema["maximum"]
        case "string":
            return is_text(value) and schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        case "array":
            return isinstance(value, list) and schema.get("minItems", 0) <= len(value) <= schema.get(
                "maxItems", len(value)
            )
        case "object":
            return isinstance(value, Mapping) and all(map(is_text, value))
    raise AssertionError(schema)


def _wrong(value: Any, schema: Schema, where: str) -> BadRequest:
    return BadRequest(f"{where} must be {_describe(schema)}, found {_shown(value)}", param=where)


def _describe(schema: Schema, plural: bool = False) -> str:
    if "anyOf" in schema:
        return " or ".join(_describe(option, plural) for option in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(_shown(option) for option in schema["enum"])
    kind = schema.get("type", "object")
    words = _TYPES[kind][plural]
    if kind == "array":
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        count = f" of {low} to {high}" if high is not None else f" of at least {low}" if low else " of"
        return words + count + " " + (_describe(schema["items"], plural=True) if "items" in schema else "values")
    if kind == "string" and "maxLength" in schema:
        return f"{words}, {schema.get('minLength', 0)} to {schema['maxLength']} characters long"
    if kind == "string" and schema.get("minLength"):
        return f"{words}, not empty"
    if kind in ("integer", "number"):
        return f"{words} from {schema['minimum']} to {schema['maximum']}"
    return words


def _unknown(key: str, known: Mapping[str, Any], where: str) -> str:
    near = difflib.get_close_matches(key[:100], known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"
    return f"unknown key {_shown(key)}{f' in {where}' if where else ''}{hint}"


def _join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _shown(value: Any) -> str:
    """A value as an error quotes it: short, whatever was sent."""
    if isinstance(value, (list, Mapping)) and value:
        return _TYPES["array" if isinstance(value, list) else "object"][0]
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
