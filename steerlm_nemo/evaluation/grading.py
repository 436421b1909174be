"""How well a value model grades: its attributes against human ones, turn by turn.

Reads what the annotator writes: a turn's `label` is the model's, its `gt_label` the human's. A turn counts for an
attribute only where both have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from steerlm_nemo.attributes import LANG, Attribute, Attributes, AttributeSchema
from steerlm_nemo.conversation import Conversation
from steerlm_nemo.correlation import pearson
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.records import read_records

ValuePair = tuple[int, int]  # (human, predicted)


@dataclass(frozen=True)
class Grading:
    """One attribute over `num_turns` turns. `confusion[h][p]`: turns that got values[h] of people, values[p] of the
    model."""

    num_turns: int
    exact_match: float
    within_one: float
    mae: float
    pearson: float | None  # None where the human or the predicted values are all the same
    values: list[int]  # the attribute's scale
    confusion: list[list[int]]

    @classmethod
    def of(cls, pairs: Mapping[ValuePair, int], attribute: Attribute) -> Grading:
        """Of how often each pair occurs. Both values of a pair are on the attribute's scale."""
        scale = attribute.values()
        confusion = np.zeros((len(scale), len(scale)), dtype=int)
        for (human, predicted), count in pairs.items():
            confusion[scale.index(human), scale.index(predicted)] += count
        humans, predictions = np.indices(confusion.shape)
        error = np.abs(humans - predictions)
        num_turns = int(confusion.sum())
        return cls(
            num_turns=num_turns,
            exact_match=float(confusion[error == 0].sum() / num_turns),
            within_one=float(confusion[error <= 1].sum() / num_turns),
            mae=float((error * confusion).sum() / num_turns),
            pearson=pearson(humans.ravel(), predictions.ravel(), confusion.ravel()),
            values=list(scale),
            confusion=confusion.tolist(),
        )


@dataclass
class Comparison:
    """Human and predicted attributes of many turns, counted as they come: memory does not grow with the turns."""

    schema: AttributeSchema
    num_off_scale: int = 0  # human values outside the model's scale, and of attributes it does not know: left out
    _pairs: dict[str, Counter[ValuePair]] = field(default_factory=dict)
    _languages: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, human: Attributes, predicted: Attributes) -> None:
        """One turn. `predicted` is legal."""
        found = predicted.as_dict()
        keys = self.schema.keys()
        for key, value in human.items:
            if key not in keys or str(value) not in self.schema.legal_values(key):
                self.num_off_scale += 1
            elif key == LANG and key in found:
                self._languages[str(value), str(found[key])] += 1
            elif key in found:
                self._pairs.setdefault(key, Counter())[int(value), int(found[key])] += 1

    def gradings(self) -> dict[str, Grading]:
        """Of every attribute that both sides have somewhere, in schema order, without `lang`, which has no scale."""
        return {
            attribute.name: Grading.of(self._pairs[attribute.name], attribute)
            for attribute in self.schema.attributes
            if attribute.name in self._pairs
        }

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file: the gradings, and for `lang` exact match and `confusion` as [human, predicted, turns]."""
        attributes: dict[str, Any] = {name: asdict(grading) for name, grading in self.gradings().items()}
        if self._languages:
            attributes[LANG] = {
                "num_turns": self._languages.total(),
                "exact_match": self._exact_languages(),
                "confusion": [[*pair, count] for pair, count in sorted(self._languages.items())],
            }
        return {"schema": self.schema.name, "num_off_scale": self.num_off_scale, "attributes": attributes}

    def text(self) -> str:
        """A table, or nothing where no turn has attributes from both sides."""
        lines = [f"  {'attribute':<20}{'turns':>8}{'exact':>8}{'within 1':>10}{'MAE':>8}{'Pearson':>9}"]
        for name, g in self.gradings().items():
            r = "n/a" if g.pearson is None else f"{g.pearson:.3f}"
            lines.append(f"  {name:<20}{g.num_turns:>8}{g.exact_match:>8.3f}{g.within_one:>10.3f}{g.mae:>8.3f}{r:>9}")
        if self._languages:
            lines.append(f"  {LANG:<20}{self._languages.total():>8}{self._exact_languages():>8.3f}")
        if self.num_off_scale:
            lines.append(f"  {self.num_off_scale} human values are not on the model's scale and are not compared")
        return "\n".join(lines) if len(lines) > 1 else ""

    def _exact_languages(self) -> float:
        same = sum(count for (human, predicted), count in self._languages.items() if human == predicted)
        return same / self._languages.total()


def evaluate(annotated_file: str | Path, schema: AttributeSchema) -> dict[str, Grading]:
    """Metrics of every attribute of the schema that at least one turn has from both sides.

    Raises:
        RecordError: no chat record, or a value off the scale.
        InputError: no turn has attributes from both sides.
    """
    comparison = Comparison(schema)
    for ref, record in read_records(annotated_file):
        for index, turn in enumerate(Conversation.from_record(record, ref).turns):
            try:
                human = schema.known(turn.truth or Attributes(()))
                comparison.add(human, schema.known(turn.attributes or Attributes(())))
            except InputError as err:
                raise RecordError(ref, str(err), index) from err
    gradings = comparison.gradings()
    if not gradings:
        raise InputError(
            f"{annotated_file}: no turn has both human and predicted attributes. Annotate a file that came with human "
            "ones: scripts/attribute_annotate.py keeps them as gt_label."
        )
    return gradings
