"""Attribute schemas and attribute lines.

An attribute line is the text a label turn carries: `quality:4,toxicity:0,lang:en` (reference: NeMo
`preprocessing.py`, SteerLM arXiv:2310.05344 section 3). A schema says which attributes exist, in which order,
with which range. The order is the order of training, whatever order a caller uses.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from steerlm_nemo.errors import FormatMismatchError, InputError, clipped, listed, shown

LANG = "lang"

# The 35 codes the reference annotator accepts (NeMo attribute_annotate.py).
LANGUAGES = (
    *("ar", "bg", "bn", "ca", "cs", "da", "de", "el", "en", "eo", "es", "eu"),
    *("fa", "fi", "fr", "gl", "he", "hu", "id", "it", "ja", "ko", "nb", "nl"),
    *("pl", "pt", "ro", "ru", "sk", "sv", "th", "tr", "uk", "vi", "zh"),
)  # fmt: skip


_MOST_VALUES = 1000  # of one attribute: each is a text to compare with

# A line comes from a file, and must not be able to end itself or to begin a turn.
_BRACKET = re.compile(r"[<>\[\]{}|]")

# How alike a name must be to one of a schema to be taken for that one, misspelt: no two names of the presets are.
_MISSPELT = 0.85
_BLANKS = " \t\r\n\xa0"  # not what else Unicode calls a space: some of it ends lines


def items_of(line: str) -> Iterator[tuple[str, str]]:
    """Key and value of each item of `key:value,...` as people write it: spaces and a comma at the end mean nothing.

    The one reader of lines. Raises ValueError saying which item is no pair, or has the key of one before it.
    """
    seen = set()
    for item in line.strip(_BLANKS).removesuffix(",").split(",") if line.strip(_BLANKS) else ():
        key, colon, value = (part.strip(_BLANKS) for part in item.partition(":"))
        if not colon or not key or key in seen:
            raise ValueError(f"attribute item {shown(item)} is not a new key:value pair")
        seen.add(key)
        yield key, value


@dataclass(frozen=True)
class Attributes:
    """What was given to one turn, in the order it is written. An empty tuple is an empty line, not "ungraded"."""

    items: tuple[tuple[str, int | str], ...]

    @classmethod
    @lru_cache(maxsize=4096)  # a data set has few different lines
    def parse(cls, line: str) -> Attributes:
        """Read `key:int,...[,lang:xx]`. Raises ValueError saying which item is malformed."""
        items: list[tuple[str, int | str]] = []
        for key, value in items_of(line):
            if _BRACKET.search(key + value) or not (key if key != LANG else value).isprintable():
                raise ValueError(
                    f"attribute item {shown(key + ':' + value)} has a character that could end the line or be a marker"
                )
            if key == LANG:
                items.append((key, value))
            elif re.fullmatch(r"0|[1-9][0-9]{0,8}", value):
                items.append((key, int(value)))
            else:
                raise ValueError(f"attribute {clipped(key, 100)} has value {shown(value)}, which is not a whole number")
        return cls(tuple(items))

    @property
    def line(self) -> str:
        """The text form, without a space; `Attributes.parse(a.line) == a`."""
        return ",".join([f"{key}:{value}" for key, value in self.items])

    def as_dict(self) -> dict[str, int | str]:
        return dict(self.items)


def _plain(key: str) -> str:
    """A key without what is easily written otherwise: case, and what stands between words."""
    return re.sub(r"[\s_-]+", "_", key.casefold())


@dataclass(frozen=True)
class Attribute:
    """One graded attribute: whole numbers from `minimum` to `maximum`, both included."""

    name: str
    minimum: int = 0
    maximum: int = 4
    default: int = 0

    def values(self) -> range:
        return range(self.minimum, self.maximum + 1)


@dataclass(frozen=True)
class AttributeSchema:
    """Names, order, ranges and steering defaults of the attributes a model was trained with."""

    name: str
    attributes: tuple[Attribute, ...]
    languages: tuple[str, ...] = ()  # legal values of the `lang` pseudo-attribute; empty: the model has no `lang`

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(attribute.name for attribute in self.attributes)

    @cached_property
    def scales(self) -> tuple[tuple[str, int, int], ...]:
        """(name, minimum, steps above it) of each attribute: for loops that run for every attribute of every turn."""
        return tuple((one.name, one.minimum, one.maximum - one.minimum) for one in self.attributes)

    def keys(self) -> tuple[str, ...]:
        """Attribute names and, where the schema has it, `lang` last: the order of a full line."""
        return self.names + ((LANG,) if self.languages else ())

    def legal_values(self, key: str) -> tuple[str, ...]:
        """The texts that may follow `key:`. Raises InputError for an unknown key, naming the nearest."""
        if key == LANG and self.languages:
            return self.languages
        for attribute in self.attributes:
            if attribute.name == key:
                return tuple(str(value) for value in attribute.values())
        near = difflib.get_close_matches(key[:100], self.keys(), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InputError(f"unknown attribute {key[:100]!r}{hint} This model knows: {listed(self.keys())}")

    def check(self, attributes: Attributes) -> None:
        """Raise InputError if a key is unknown or a value is outside its range."""
        for key, value in attributes.items:
            legal = self.legal_values(key)
            if str(value) not in legal:
                span = f"{legal[0]} to {legal[-1]}" if key != LANG else "one of " + " ".join(legal)
                raise InputError(f"attribute {key} is {clipped(str(value), 100)}, but it must be {span}")

    def known(self, attributes: Attributes) -> Attributes:
        """Those that this schema has, without `lang`.

        Raises:
            InputError: a value is outside its range, or a key is one of the schema's, misspelt.
        """
        self.foreign(attributes)
        known = Attributes(tuple((key, value) for key, value in attributes.items if key in self.names))
        self.check(known)
        return known

    def foreign(self, attributes: Attributes) -> list[str]:
        """Keys that this schema does not have. Raises InputError for one that is the schema's, misspelt: `Humour`."""
        known = {_plain(key): key for key in self.keys()}
        unknown = [key for key, _ in attributes.items if key not in self.keys()]
        for key in unknown:
            for near in difflib.get_close_matches(_plain(key[:100]), known, n=1, cutoff=_MISSPELT):
                raise InputError(f"attribute {key[:100]!r} is not known, but {known[near]!r} is; correct one of them")
        return unknown

    def order(self, values: Mapping[str, int | str]) -> Attributes:
        """The given values in schema order, checked. Attributes that are not given are left out."""
        for key in values:
            self.legal_values(key)
        attributes = Attributes(tuple((key, values[key]) for key in self.keys() if key in values))
        self.check(attributes)
        return attributes

    def complete(self, values: Mapping[str, int | str]) -> Attributes:
        """A full line for steering: the given values, the schema's default for every other attribute."""
        full: dict[str, int | str] = {attribute.name: attribute.default for attribute in self.attributes}
        if self.languages:
            full[LANG] = "en" if "en" in self.languages else self.languages[0]
        return self.order({**full, **values})

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "attributes": [asdict(attribute) for attribute in self.attributes],
            "languages": list(self.languages),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttributeSchema:
        """Inverse of `to_dict`. A minimum that is not given is 0, a default the minimum, a maximum 4.

        Raises:
            FormatMismatchError: the mapping is not a schema, or one that no attribute line could follow.
        """
        try:
            schema = cls(
                name=str(data["name"]),
                attributes=tuple(
                    Attribute(**{"default": attribute.get("minimum", 0), **attribute})
                    for attribute in data["attributes"]
                ),
                languages=tuple(data["languages"]),
            )
            schema._require_writable()
        except (KeyError, TypeError, ValueError, AttributeError) as err:
            raise FormatMismatchError(f"not an attribute schema: {err}. Found: {shown(dict(data))}") from err
        return schema

    def _require_writable(self) -> None:
        """Raise ValueError unless every attribute, at each of its values, can stand in an attribute line."""
        for attribute in self.attributes:
            if not isinstance(attribute.name, str):
                raise ValueError(f"attribute name {shown(attribute.name)} is no text; put it in quotes")
            bounds = (attribute.minimum, attribute.default, attribute.maximum)
            if any(type(bound) is not int for bound in bounds) or list(bounds) != sorted(bounds):
                raise ValueError(
                    f"attribute {shown(attribute.name)} runs from {shown(bounds[0])} to {shown(bounds[2])} with "
                    f"default {shown(bounds[1])}; it needs whole numbers, the default between the others"
                )
            if attribute.maximum - attribute.minimum >= _MOST_VALUES:
                raise ValueError(f"attribute {shown(attribute.name)} has more than {_MOST_VALUES:,} values")
        items = [f"{attribute.name}:{attribute.minimum}" for attribute in self.attributes]
        for line in (",".join(items), *(f"{LANG}:{language}" for language in self.languages)):
            if Attributes.parse(line).line != line:
                raise ValueError(f"a line would not be read as it is written: {line!r}")
            if not line:
                raise ValueError("it has no attributes")
        if any(not isinstance(language, str) or "," in language for language in self.languages):
            raise ValueError(f"languages are texts without commas, found {shown(self.languages)}")
        if LANG in self.names:
            raise ValueError(f"{LANG!r} is no attribute; list its values under 'languages'")


_HIGH = {"quality", "helpfulness", "correctness", "coherence", "complexity", "verbosity"}


def _schema(name: str, names: str, *, maximum: int = 4, languages: tuple[str, ...] = ()) -> AttributeSchema:
    # Steering defaults as the reference's clients have them: the wanted attributes at the top, the rest at 0.
    attributes = tuple(Attribute(key, 0, maximum, maximum if key in _HIGH else 0) for key in names.split())
    return AttributeSchema(name, attributes, languages)


_NEMO12 = (
    "quality toxicity humor creativity violence helpfulness not_appropriate hate_speech sexual_content fails_task"
    " political_content moral_judgement"
)
NEMO12_LANG = _schema("nemo12+lang", _NEMO12, languages=LANGUAGES)
NEMO12 = _schema("nemo12", _NEMO12)
HELPSTEER5 = _schema("helpsteer5", "helpfulness correctness coherence complexity verbosity")
COMBINED9 = _schema(
    "combined9", "quality toxicity humor creativity helpfulness correctness coherence complexity verbosity"
)
PAPER7 = _schema("paper7", "quality toxicity violence helpfulness creativity humor inappropriateness", maximum=9)
TOY6 = _schema("toy6", "quality toxicity humor creativity helpfulness verbosity")
# What the published OASST1 and OASST2 trees are graded on; political_content and moral_judgement are in the early
# export only. A value model asked for attributes it has never seen answers noise, and slowly.
OASST10_LANG = _schema(
    "oasst10+lang",
    "quality toxicity humor creativity violence helpfulness not_appropriate hate_speech sexual_content fails_task",
    languages=LANGUAGES,
)

# What NeMo-Aligner takes of OASST into the nine of `combined9`: the helpfulness there is HelpSteer's.
OASST4 = _schema("oasst4", "quality toxicity humor creativity")

PRESETS = {
    schema.name: schema for schema in (NEMO12_LANG, NEMO12, HELPSTEER5, COMBINED9, PAPER7, TOY6, OASST10_LANG, OASST4)
}


def schema_named(name: str) -> AttributeSchema:
    """A preset by name. Raises InputError listing the presets."""
    if name not in PRESETS:
        raise InputError(f"unknown attribute schema {name!r}; known: {', '.join(PRESETS)}, or a .yaml file")
    return PRESETS[name]


def load_schema(name_or_path: str) -> AttributeSchema:
    """A preset by name, or a YAML file with the fields of `AttributeSchema.to_dict`.

    Raises:
        InputError: neither a preset nor a readable YAML file; the message lists the presets.
        FormatMismatchError: the YAML is not a schema.
    """
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        return schema_named(name_or_path)

    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise InputError(f"attribute schema {path}: {err.strerror}") from err
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as err:
        raise InputError(f"{path}: not YAML: {err}") from err
    if not isinstance(data, Mapping):
        raise InputError(
            f"{path}: an attribute schema has the keys name, attributes and languages; found {shown(data)}"
        )
    return AttributeSchema.from_dict(data)


def digest_of(data: Mapping[str, Any]) -> str:
    """16 hex digits of the SHA-256 of the canonical JSON of `data`."""
    canonical = json.dumps(data, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]
