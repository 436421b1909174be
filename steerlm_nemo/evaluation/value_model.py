"""How well a value model grades: its labels against human ones, turn by turn.

Reads what the annotator writes: a turn's `label` is the model's, its `gt_label` the human's. A turn counts for an
attribute only where both have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from steerlm_nemo.attributes import Attributes, AttributeSchema
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
    def of(cls, pairs: Iterable[Pair], num_grades: int) -> Grading:
        """`num_grades` is the length of the scale, which starts at 0."""
        human, predicted = np.array(list(pairs)).T
        error = np.abs(human - predicted)
        confusion = np.zeros((num_grades, num_grades), dtype=int)
        np.add.at(confusion, (human, predicted), 1)
        return cls(
            num_turns=len(human),
            exact_match=float(np.mean(error == 0)),
            within_one=float(np.mean(error <= 1)),
            mae=float(np.mean(error)),
            pearson=pearson(human, predicted),
            confusion=confusion.tolist(),
        )


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
