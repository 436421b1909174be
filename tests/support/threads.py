"""Chat records for the stub server, and the labels it must give them, worked out here by the stub's rule."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import stub_server

WORDS = ("tell", "me", "how", "zorps", "sing", "in the", "rain", "éü", "日本", "while", "seven", "sleep")


def records(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Threads in the order of trees: up to four share their first turns. Some turns have human labels."""
    chance = random.Random(seed)

    def text(length: int) -> str:
        return " ".join(chance.choice(WORDS) for _ in range(length))

    made: list[dict[str, Any]] = []
    while len(made) < count:
        tree = f"t{len(made)}"
        start = [{"value": text(6), "from": "User", "label": None}]
        start.append({"value": text(9), "from": "Assistant", "label": "quality:4,humor:1,lang:en", "lang": "en"})
        for _ in range(chance.randint(1, 4)):
            turns = [dict(turn) for turn in start]
            if chance.random() < 0.7:
                turns += [{"value": text(5), "from": "User"}, {"value": text(7), "from": "Assistant"}]
            system = "A chat between two.\n\n"
            made.append({"conversations": turns, "tree_id": tree, "system": system, "mask": "User", "type": None})
    return made[:count]


def write(path: Path, made: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in made), encoding="utf-8")
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def expected(record: dict[str, Any], given: Any = lambda turn: {}) -> dict[str, Any]:
    """The record as it must come out: assistant turns graded in order, each after the grades of those before.

    `given(turn)`: values that are forced.
    """
    prompt = f"<extra_id_0>System\n{record['system']}\n"
    turns = []
    for turn in record["conversations"]:
        prompt += f"<extra_id_1>{turn['from']}\n{turn['value']}\n"
        graded = dict(turn)
        if turn["from"] == "Assistant":
            human = turn.get("label")
            graded["label"], _ = stub_server.line(prompt + "<extra_id_2>", given(turn))
            if human is not None:
                graded["gt_label"] = human
        if graded.get("label") is not None:
            prompt += f"<extra_id_2>{graded['label']}\n"
        turns.append(graded)
    return {**record, "conversations": turns}
