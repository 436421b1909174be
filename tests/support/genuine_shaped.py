"""Samples that this repository makes itself, in the shape of the genuine ones, for clones that do not have those.

Same folders, same keys, same oddities, and the same counts wherever a test states counts, so that one test holds for
both: trees that come twice, lone prompts, deleted messages, messages without labels or with labels that no schema
keeps, null labels in the flat form, parents that are missing, deep threads, texts of every length, emoji, CRLF, many
languages; pairs that are cut off or have one speaker twice. The texts are nonsense.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

LABELS = (
    *("spam", "lang_mismatch", "pii", "not_appropriate", "hate_speech", "sexual_content", "quality", "toxicity"),
    *("humor", "helpfulness", "creativity", "violence", "fails_task", "political_content", "moral_judgement"),
)
LANGUAGES = (
    *("en", "es", "zh", "ru", "eo", "pt-BR", "de", "ja", "fr", "ca", "it", "th", "uk-UA", "pl", "hu", "vi", "ar"),
    *("eu", "sv", "id", "cs", "ko", "fi", "da", "tr", "he", "fa", "nb-NO"),
)
WORDS = """
the of and to a in is that it for you are as with on can be this your or not what how from have an they which one water
paris animal language model because learning question answer history little story better usually example über niño été
привет 水 日本語 ไทย 🙂 👩\u200d👩\u200d👧 naïve x=1 `code` {json} <b> don't 42 3.14
""".split()  # noqa: SIM905
ENDS = (". ", "? ", "!\n", ".\n\n", ", ", ":\r\n", "  ", ";\t")


def write_samples(folder: Path) -> None:
    """The whole folder; the same bytes each time."""
    chance = random.Random(20230415)
    trees = [_tree(chance, f"oasst1-{n}", leaves, nodes) for n, (leaves, nodes) in enumerate(_shares(130, 683, 1361))]
    _strip_labels(trees)
    _write(folder / "oasst1-en-validation" / "trees.jsonl.gz", trees)
    _write(folder / "oasst1-en-validation" / "messages.jsonl.gz", _messages(trees))
    _write(folder / "oasst2-animals-trees" / "trees.jsonl.gz", _animals(chance))
    _write(folder / "oasst-unlabelled-trees" / "trees.jsonl.gz", _unlabelled(chance))
    _write(folder / "helpsteer-sample" / "helpsteer.jsonl.gz", _helpsteer(chance))
    _write(folder / "hh-rlhf" / "harmless-base-test.jsonl.gz", _transcripts(chance, 1630, num_empty=3, num_twice=8))
    _write(
        folder / "hh-rlhf" / "helpful-base-train-sample.jsonl.gz", _transcripts(chance, 359, num_empty=0, num_twice=1)
    )
    texts = lambda *keys: {key: _text(chance) for key in keys}  # noqa: E731
    _write(
        folder / "cvalues" / "cvalues_comparison_two_rows.jsonl",
        [texts("prompt", "pos_resp", "neg_resp") | {"pos_type": "p", "neg_type": "n"} for _ in range(2)],
    )
    _write(
        folder / "cvalues" / "cvalues_responsibility_prompts.jsonl",
        [texts("prompt", "domain_en", "domain_zh") | {"id_": n} for n in range(9)],
    )
    _write(folder / "mt-bench" / "question.jsonl", [{"question_id": n, "turns": [_text(chance)] * 2} for n in range(9)])
    _write(
        folder / "rewardbench-sample" / "reward_bench.jsonl.gz",
        [texts("prompt", "chosen", "rejected") | {"subset": "chat", "id": n} for n in range(348)],
    )
    _write(
        folder / "nemo-aligner-test-data" / "sft-chat.jsonl",
        [
            {"system": "", "mask": "User", "dataset": "d", "type": "TEXT_TO_VALUE"}
            | {"conversations": [{"from": "User", "value": "1\r\n2"}, {"from": "Assistant", "value": _text(chance)}]}
            for _ in range(21)
        ],
    )
    _write(
        folder / "nemo-aligner-test-data" / "rm-pairs.jsonl",
        [
            {
                "text": f"<extra_id_0>System\nS.\n<extra_id_1>User\n{_text(chance)}\n<extra_id_1>Assistant\nYes.\n"
                "<extra_id_2>",
                "label": [-100.0] * 4 + [1.0, 1.0, 3.0, 2.0, 4.0],
            }
            for _ in range(4)
        ],
    )


def sentences(count: int) -> list[str]:
    chance = random.Random(0)
    return [_line(chance) for _ in range(count)]


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def _text(chance: random.Random) -> str:
    """Mostly short, some a thousand words long."""
    num_words = 3 + int(chance.lognormvariate(2.8, 1.1))
    return "".join(
        chance.choice(WORDS) + (chance.choice(ENDS) if chance.random() < 0.15 else " ") for _ in range(num_words)
    ).strip()


def _shares(num_trees: int, num_threads: int, num_messages: int) -> list[tuple[int, int]]:
    """Threads and messages of each tree: as even as they go."""

    def even(whole: int) -> list[int]:
        return [whole // num_trees + (n < whole % num_trees) for n in range(num_trees)]

    return list(zip(even(num_threads), even(num_messages), strict=True))


def _tree(chance: random.Random, name: str, num_leaves: int, num_nodes: int, **fields: Any) -> dict[str, Any]:
    """A tree of so many threads and messages; what is no leaf hangs under another, mostly in a chain."""
    inner = [_message(chance, f"{name}/0", "prompter", **fields)]
    inner[0]["text"] = f"{name}: {inner[0]['text']}"  # no two trees ask the same
    numbers = iter(range(1, num_nodes))
    while len(inner) < num_nodes - num_leaves:
        parent = inner[-1] if chance.random() < 0.8 or sum(not m["replies"] for m in inner) >= num_leaves else inner[0]
        inner.append(_reply(chance, parent, f"{name}/{next(numbers)}", **fields))
    ends = [message for message in inner if not message["replies"]]
    for n, number in enumerate(numbers):
        _reply(chance, ends[n] if n < len(ends) else chance.choice(inner), f"{name}/{number}", **fields)
    return {"message_tree_id": inner[0]["message_id"], "tree_state": "ready_for_export", "prompt": inner[0]}


def _reply(chance: random.Random, parent: dict[str, Any], name: str, **fields: Any) -> dict[str, Any]:
    role = "assistant" if parent["role"] == "prompter" else "prompter"
    reply = _message(chance, name, role, parent_id=parent["message_id"], **fields)
    parent["replies"].append(reply)
    return reply


def _message(chance: random.Random, name: str, role: str, lang: str = "en", **fields: Any) -> dict[str, Any]:
    message = {"message_id": name, "text": _text(chance), "role": role, "lang": lang, **fields}
    message |= {"review_count": 3, "deleted": chance.random() < 0.02, "emojis": {"+1": 2}, "replies": []}
    if "labels" not in fields:
        kept = [label for label in LABELS if label == "spam" or chance.random() < 0.9]
        message["labels"] = {label: {"value": chance.randrange(9) / 8, "count": 3} for label in kept}
    return message


def _every(trees: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for tree in trees:
        pending = [tree["prompt"]]
        while pending:
            message = pending.pop()
            pending += reversed(message["replies"])
            yield message


def _strip_labels(trees: list[dict[str, Any]]) -> None:
    """Four messages without labels, six with such as no schema keeps."""
    answers = [message for message in _every(trees[::13]) if message["role"] == "assistant"]
    for message in answers[:4]:
        del message["labels"]
    for message in answers[4:10]:
        message["labels"] = {"spam": {"value": 0.0, "count": 3}}


def _messages(trees: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The flat form of the same trees: labels as parallel lists or null, and two messages whose parent is missing."""
    for tree in trees:
        own = {"message_tree_id": tree["message_tree_id"], "tree_state": tree["tree_state"]}
        for message in _every([tree]):
            flat = {"parent_id": None, **message, **own}
            labels = flat.pop("labels", None)
            del flat["replies"]
            flat["labels"] = labels and {
                "name": list(labels),
                "value": [label["value"] for label in labels.values()],
                "count": [label["count"] for label in labels.values()],
            }
            yield flat
    for n in range(2):
        yield {**flat, "message_id": f"orphan {n}", "parent_id": "nobody"}


def _animals(chance: random.Random) -> list[dict[str, Any]]:
    """386 lines: 82 trees of 402 threads, the rest prompts without reply; 23 of the trees come twice."""
    answered = []
    for n, (leaves, nodes) in enumerate(_shares(70, 346, 690)):
        answered.append(_tree(chance, f"animal-{n}", leaves, nodes, lang=LANGUAGES[n % len(LANGUAGES)]))
    # So long that no target is left in a short window.
    answered[0]["prompt"]["text"] += " long" * 2000
    # Twelve of these come twice: 346 + 56 threads.
    again = [tree for tree in answered if sum(not m["replies"] for m in _every([tree])) == 5][:8]
    again += [tree for tree in answered if sum(not m["replies"] for m in _every([tree])) == 4][:4]
    lone = []
    for n in range(293):
        prompt = _message(chance, f"lone-{n}/0", "prompter", lang=LANGUAGES[n % len(LANGUAGES)])
        lone.append({"message_tree_id": f"lone-{n}/0", "tree_state": "prompt_lottery_waiting", "prompt": prompt})
    lines = [*answered, *again, *lone, *lone[:11]]
    chance.shuffle(lines)
    return lines


def _unlabelled(chance: random.Random) -> Iterator[dict[str, Any]]:
    for n, (leaves, nodes) in enumerate(_shares(70, 447, 831)):
        tree = _tree(chance, f"early-{n}", leaves, nodes, synthetic=n % 3 == 0)
        for message in _every([tree]):
            del message["labels"]
        yield tree


def _helpsteer(chance: random.Random) -> Iterator[dict[str, Any]]:
    """Correctness goes with helpfulness, verbosity hardly."""
    given = [value for value, times in enumerate((6, 16, 66, 151, 78)) for _ in range(times)]
    chance.shuffle(given)
    for helpfulness in given:
        near = min(max(helpfulness + chance.choice((-1, 0, 0, 0, 0, 0, 1)), 0), 4)
        verbosity = helpfulness if chance.random() < 0.25 else chance.randrange(5)
        yield {
            **{"prompt": _text(chance), "response": _text(chance), "helpfulness": helpfulness, "correctness": near},
            **{"coherence": min(near + 1, 4), "complexity": chance.randrange(5), "verbosity": verbosity},
        }


def _transcripts(chance: random.Random, count: int, num_empty: int, num_twice: int) -> Iterator[dict[str, Any]]:
    """Pairs that share all but the last response; in some that is empty, or a speaker comes twice in a row."""
    for n in range(count):
        begin = "".join(f"\n\nHuman: {_line(chance)}\n\nAssistant: {_line(chance)}" for _ in range(chance.randrange(3)))
        begin += f"\n\nHuman: {_line(chance)}"
        if n < num_twice:
            begin += f"\n\nHuman: {_line(chance)}"
        ends = ("", _line(chance)) if num_twice <= n < num_twice + num_empty else (_line(chance), _line(chance))
        chosen, rejected = (f"{begin}\n\nAssistant: {end}" for end in ends)
        yield {"chosen": chosen, "rejected": rejected}


def _line(chance: random.Random) -> str:
    return " ".join(_text(chance).split())
