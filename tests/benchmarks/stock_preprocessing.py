"""NeMo's preprocessing as its behaviour is specified: everything in memory, recursive, one dump per path.

python stock_preprocessing.py INPUT OUTPUT_PREFIX
"""

from __future__ import annotations

import json
import random
import sys
from typing import Any

KEYS = (
    *("quality", "toxicity", "humor", "creativity", "violence", "helpfulness", "not_appropriate"),
    *("hate_speech", "sexual_content", "fails_task", "political_content", "moral_judgement"),
)
ROLES = {"prompter": "User", "assistant": "Assistant"}
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.\n\n"
)


def conversations(node: dict[str, Any], before: list[dict[str, Any]], found: list[list[dict[str, Any]]]) -> None:
    turn = {"value": node["text"], "from": ROLES[node["role"]]}
    if "labels" in node:
        labels = node["labels"]
        turn["label"] = ",".join(f"{key}:{round(labels[key]['value'] * 4)}" for key in KEYS if key in labels)
    if "lang" in node:
        lang = node["lang"].split("-")[0]
        turn["label"] = ",".join(filter(None, [turn["label"], f"lang:{lang}"]))
        turn["lang"] = lang
    path = [*before, turn]
    for reply in node["replies"]:
        conversations(reply, path, found)
    if not node["replies"] and len(path) > 1:
        found.append(path)


def main() -> None:
    source, prefix = sys.argv[1:]
    with open(source, encoding="utf-8") as file:
        trees = [json.loads(line) for line in file]
    random.seed(10)
    random.shuffle(trees)
    num_train = int(len(trees) * 0.95)
    for part, chosen in (("train", trees[:num_train]), ("val", trees[num_train:])):
        with open(f"{prefix}_{part}.jsonl", "w", encoding="utf-8") as output:
            for tree in chosen:
                found: list[list[dict[str, Any]]] = []
                conversations(tree["prompt"], [], found)
                for turns in found:
                    record = {"conversations": turns, "tree_id": tree["message_tree_id"], "system": SYSTEM}
                    record |= {"mask": "User", "type": "TEXT_TO_VALUE"}
                    output.write(json.dumps(record, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
