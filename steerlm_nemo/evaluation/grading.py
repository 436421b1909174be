"""How well a value model grades: its labels against human ones, turn by turn.

Reads what the annotator writes: a turn's `label` is the model's, its `gt_label` the human's. A turn counts for an
attribute only where both have it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from steerlm_nemo.attributes import LANG, Attributes, AttributeSchema
from steerlm_nemo.errors import InputError, RecordError
from steerlm_nemo.evaluation.statistics import pearson
from steerlm_nemo.records import read_records

Pair = tuple[int, int]  # (human grade, predicted grade)


@dataclass(frozen=True)
class Grading:
    """One attribute over `num_turns` turns. `confusion[h][p]`: turns a human graded h and the model p."""

    num_turns: int
    exact_match: float
    within_one: float
    mae: float
    pearson: float | None  # None where the human or the predicted grades are all the same
    confusion: list[list[int]]

    @classmethod
    def of(cls, pairs: Iterable[Pair] | Mapping[Pair, int], num_grades: int) -> Grading:
        """Of pairs, or of how often each occurs. `num_grades` is the length of the scale, which starts at 0."""
        confusion = np.zeros((num_grades, num_grades), dtype=int)
        for pair, count in Counter(pairs).items():
            confusion[pair] += count
        counts = confusion.ravel()
        human, predicted = (np.repeat(axis.ravel(), counts) for axis in np.indices(confusion.shape))
        error = np.abs(human - predicted)
        return cls(
            num_turns=len(human),
            exact_match=float(np.mean(error == 0)),
            within_one=float(np.mean(error <= 1)),
            mae=float(np.mean(error)),
            pearson=pearson(human, predicted),
            confusion=confusion.tolist(),
        )


@dataclass
class Comparison:
    """Human and predicted labels of many turns, counted as they come: memory does not grow with the turns."""

    schema: AttributeSchema
    num_off_scale: int = 0  # human values outside the model's scale, and of attributes it does not know: left out
    _pairs: dict[str, Counter[Pair]] = field(default_factory=dict)
    _languages: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, human: Attributes, predicted: Attributes) -> None:
        """One turn. `predicted` is legal."""
        found = predicted.as_dict()
        for key, value in human.items:
            known = key in self.schema.keys()  # noqa: SIM118 - no mapping
            if not known or str(value) not in self.schema.legal_values(key):
                self.num_off_scale += 1
            elif key == LANG and key in found:
                self._languages[str(value), str(found[key])] += 1
            elif key in found:
                self._pairs.setdefault(key, Counter())[int(value), int(found[key])] += 1

    def gradings(self) -> dict[str, Grading]:
        """Of every attribute that both sides have somewhere, in schema order, without `lang`, which has no scale."""
        num_grades = {attribute.name: attribute.maximum + 1 for attribute in self.schema.attributes}
        return {
            name: Grading.of(self._pairs[name], num_grades[name]) for name in self.schema.names if name in self._pairs
        }

    def to_dict(self) -> dict[str, Any]:
        """For a JSON file: the gradings, and for `lang` exact match and `confusion` as [human, predicted, turns]."""
        attributes: dict[str, Any] = {name: vars(grading) for name, grading in self.gradings().items()}
        if self._languages:
            attributes[LANG] = {
                "num_turns": self._languages.total(),
                "exact_match": self._exact_languages(),
                "confusion": [[*pair, count] for pair, count in sorted(self._languages.items())],
            }
        return {"schema": self.schema.name, "num_off_scale": self.num_off_scale, "attributes": attributes}

    def text(self) -> str:
        """A table, or nothing where no turn has both labels."""
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


def grade_pairs(annotated_file: str | Path, schema: AttributeSchema) -> dict[str, list[Pair]]:
    """Human and predicted grades of every attribute of the schema, over all turns of a file.

    Raises:
        RecordError: a label is malformed or off the scale.
        InputError: no turn has both labels.
    """
    pairs: dict[str, list[Pair]] = {name: [] for name in schema.names}
    for ref, record in read_records(annotated_file):
        for index, turn in enumerate(record.get("conversations", [])):
            human, predicted = (_grades(turn, key, schema, f"{ref} turn {index}") for key in ("gt_label", "label"))
            for name in schema.names:
                if name in human and name in predicted:
                    pairs[name].append((human[name], predicted[name]))
    if not any(pairs.values()):
        raise InputError(
            f"{annotated_file}: no turn has both a human and a predicted label. Annotate a file that came with human "
            "labels: scripts/attribute_annotate.py keeps them as gt_label."
        )
    return pairs


def _grades(turn: Mapping[str, Any], key: str, schema: AttributeSchema, where: str) -> dict[str, int]:
    try:
        attributes = Attributes.parse(turn.get(key) or "")
        known = {name: value for name, value in attributes.items if name in schema.names}
        schema.check(Attributes(tuple(known.items())))
    except (ValueError, InputError) as err:
        raise RecordError(f"{where}: {key}: {err}") from err
    return {name: int(value) for name, value in known.items()}


def evaluate(annotated_file: str | Path, schema: AttributeSchema) -> dict[str, Grading]:
    """Metrics of every attribute that at least one turn has from both sides. Raises as `grade_pairs`."""
    num_grades = {attribute.name: attribute.maximum + 1 for attribute in schema.attributes}
    return {
        name: Grading.of(pairs, num_grades[name])
        for name, pairs in grade_pairs(annotated_file, schema).items()
        if pairs
    }
