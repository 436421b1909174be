"""What a model is for: its kind, a row of `KINDS`, kept in its `.nemo` with template and attribute schema.

Server routes, annotator, steering client, report and export ask the kind what a model can do; nobody asks which records
it happened to be trained on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from steerlm_nemo.attributes import Attributes, AttributeSchema, digest_of
from steerlm_nemo.conversation import ASSISTANT, TEXT_TO_VALUE, VALUE_TO_TEXT, Conversation, RecordType
from steerlm_nemo.errors import FormatMismatchError
from steerlm_nemo.template import ChatTemplate

FORMAT_VERSION = 2
PROVENANCE_KEY = "steerlm_provenance"  # in `model_config.yaml`: name, base, data and seed of the run that made a model
MODEL_HEADER = "x-model-identity"  # of every answer of a server: the weights, config and tokenizer that gave it

# What a model can be asked for.
GENERATE = "generate"  # continue any text
CHAT = "chat"  # respond to a conversation
STEER = "steer"  # and that at requested attributes
LINES = "lines"  # write a full attribute line after a prompt, with probabilities
GRADE = "grade"  # give the turns of conversations attributes
SCORE = "score"  # give conversations numbers, without writing text


@dataclass(frozen=True)
class ModelKind:
    """`record_type` is the type of the chat records that train such a model; None where pairs or vectors do."""

    name: str
    title: str  # in a sentence, after "is"
    record_type: RecordType | None
    abilities: frozenset[str]


def _kind(name: str, title: str, record_type: RecordType | None, *abilities: str) -> ModelKind:
    return ModelKind(name, title, record_type, frozenset(abilities))


GRADER = _kind("grader", "a value model, which grades by writing", TEXT_TO_VALUE, GENERATE, LINES, GRADE)
STEERLM = _kind("steerlm", "a SteerLM model, which responds at attributes", VALUE_TO_TEXT, GENERATE, CHAT, STEER)
PLAIN = _kind("plain", "a model fine-tuned on conversations without attributes", None, GENERATE, CHAT)
REGRESSION = _kind("regression", "a regression model, which grades by numbers", None, GRADE, SCORE)
REWARD = _kind("reward", "a pairwise reward model", None, SCORE)
PREFERENCE = _kind("preference", "a model aligned by preferences", VALUE_TO_TEXT, GENERATE, CHAT, STEER)
KINDS = {kind.name: kind for kind in (GRADER, STEERLM, PLAIN, REGRESSION, REWARD, PREFERENCE)}

# A checkpoint that no trainer of this project has made continues text, and chats where it brings a template of its own.
ABILITIES_WITHOUT_KIND = frozenset({GENERATE})


def kinds_that(ability: str) -> tuple[ModelKind, ...]:
    """The kinds that have an ability."""
    return tuple(kind for kind in KINDS.values() if ability in kind.abilities)


def kind_trained_on(record_type: str | None) -> ModelKind:
    """What supervised fine-tuning on records of this type makes. Raises FormatMismatchError for an unknown type."""
    for kind in (GRADER, STEERLM, PLAIN):
        if kind.record_type == record_type:
            return kind
    raise FormatMismatchError(
        f"records of type {record_type!r} make no known kind of model; a value model is trained on {TEXT_TO_VALUE} "
        f"records, a SteerLM model on {VALUE_TO_TEXT} ones"
    )


_KEYS = {
    1: frozenset({"version", "record_type", "template", "schema"}),
    2: frozenset({"version", "kind", "template", "schema"}),
}


@dataclass(frozen=True)
class SteerLMFormat:
    """Template, attribute schema and kind of a trained model: one versioned object kept in `model_config.yaml`.

    Version 1 had the type of the training records in place of the kind; it is still read.
    """

    template: ChatTemplate
    schema: AttributeSchema
    kind: ModelKind

    CONFIG_KEY = "steerlm"

    def to_dict(self) -> dict[str, Any]:
        body: dict[str, Any] = {
            "version": FORMAT_VERSION,
            "kind": self.kind.name,
            "template": asdict(self.template),
            "schema": self.schema.to_dict(),
        }
        return {**body, "digest": digest_of(body)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SteerLMFormat:
        """Inverse of `to_dict`.

        Raises:
            FormatMismatchError: the version is unknown, a key is missing or the digest does not match the content.
        """
        try:
            if data["version"] not in (1, FORMAT_VERSION):
                raise FormatMismatchError(
                    f"format version {data['version']!r} is not supported; this program reads versions 1 to "
                    f"{FORMAT_VERSION}"
                )
            body = {key: value for key, value in data.items() if key in _KEYS[data["version"]]}
            if digest_of(body) != data["digest"]:
                raise FormatMismatchError(
                    f"the format's content has digest {digest_of(body)}, but it says {data['digest']}: "
                    "it was edited by hand. Restore it from the checkpoint."
                )
            if data["version"] == 1:
                # Records without a type were noted as the text "None".
                kind: ModelKind | None = kind_trained_on(None if data["record_type"] == "None" else data["record_type"])
            else:
                kind = KINDS.get(data["kind"])
            if kind is None:
                raise FormatMismatchError(f"a model of kind {data['kind']!r} is not known; known: {', '.join(KINDS)}")
            return cls(ChatTemplate(**data["template"]), AttributeSchema.from_dict(data["schema"]), kind)
        except (KeyError, TypeError) as err:
            raise FormatMismatchError(f"not a SteerLM format: {err}. Found keys: {sorted(data)}") from err

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> SteerLMFormat | None:
        """The format in a `model_config.yaml`; None where no trainer of this project has written one.

        Raises:
            FormatMismatchError: as `from_dict`.
        """
        stored = config.get(cls.CONFIG_KEY)
        return cls.from_dict(stored) if stored is not None else None

    def steering_prompt(self, conversation: Conversation, attributes: Attributes) -> str:
        """Text after which the model responds to a conversation at these attributes."""
        return self.template.steering_prompt(conversation, ASSISTANT, attributes.line)

    def plain_prompt(self, conversation: Conversation) -> str:
        """Text after which a model that knows no attributes responds to a conversation."""
        return self.template.plain_prompt(conversation, ASSISTANT)

    def require_same(self, other: SteerLMFormat, ours: str, theirs: str) -> None:
        """Raise FormatMismatchError, printing both sides, unless both agree in everything."""
        if self != other:
            raise FormatMismatchError(
                f"{ours} and {theirs} disagree about kind, markers or attributes.\n"
                f"  {ours}: {self.kind.name}, {self.template!r}, {self.schema.name}: {', '.join(self.schema.keys())}\n"
                f"  {theirs}: {other.kind.name}, {other.template!r}, {other.schema.name}: "
                f"{', '.join(other.schema.keys())}"
            )
