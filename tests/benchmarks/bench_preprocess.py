"""Preprocessing 100,000 threads of OpenAssistant-shaped trees: NeMo's algorithm, ours, and the machine's limit.

The limit parses the same input with orjson and writes the same number of bytes. Each runs in a process of its own,
interpreter start included. The outputs must be equal byte for byte.
"""

from __future__ import annotations

import filecmp
import json
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import Run, in_turns, measured_process, report

ROOT = Path(__file__).resolve().parents[2]
NUM_THREADS = 100_000
REPEATS = 3
WORDS = (  # noqa: SIM905 - a list of 70 literals reads worse
    "the of and to a in is that it was for on are as with his they be at one have this from or had by hot but some "
    "what there we can out other were all your when up use word how said an each she which do their time if will way "
    'naïve café übermäßig 天気 は いい です сегодня хорошая погода \n\n `code` \\ "quoted" 1. 2. 3. - • 🙂'
).split(" ")
LABELS = (
    *("spam", "lang_mismatch", "pii", "not_appropriate", "hate_speech", "sexual_content", "quality", "toxicity"),
    *("humor", "creativity", "violence", "helpfulness", "fails_task"),
)

LIMIT = """
import sys, orjson
source, outputs, target = sys.argv[1], sys.argv[2:4], sys.argv[4]
with open(source, "rb") as file:
    for line in file:
        orjson.loads(line)
with open(target, "wb") as written:
    for output in outputs:
        with open(output, "rb") as file:
            while chunk := file.read(1 << 20):
                written.write(chunk)
"""


def message(rng: random.Random, role: str, number: int) -> dict[str, Any]:
    """Text lengths, labels and bookkeeping fields as in OASST1's English validation split."""
    num_words = max(1, round(rng.lognormvariate(2.6 if role == "prompter" else 4.3, 1.0)))
    return {
        "message_id": f"{rng.getrandbits(128):032x}",
        "user_id": f"{rng.getrandbits(128):032x}",
        "created_date": "2023-02-07T17:29:24.727400+00:00",
        "text": " ".join(rng.choices(WORDS, k=num_words)),
        "role": role,
        "lang": rng.choice(("en", "en", "es", "pt-BR", "ru")),
        "review_count": 3,
        "review_result": True,
        "deleted": False,
        "rank": number,
        "synthetic": False,
        "emojis": {"+1": number},
        "labels": {name: {"value": rng.randint(0, 12) / 12, "count": 3} for name in LABELS},
        "replies": [],
    }


def tree(rng: random.Random) -> tuple[dict[str, Any], int]:
    """A tree and its number of threads: about 10 messages and 5 threads, as in the genuine split."""
    prompt = message(rng, "prompter", 0)
    num_threads = 0
    level = [prompt]
    for depth in range(1, 6):
        below = []
        for parent in level:
            num_replies = rng.choice((2, 2, 3) if depth == 1 else (0, 1, 2) if depth < 4 else (0, 0, 1))
            role = "assistant" if depth % 2 else "prompter"
            parent["replies"] = [message(rng, role, number) for number in range(num_replies)]
            num_threads += not num_replies
            below += parent["replies"]
        level = below
    num_threads += len(level)
    return {"message_tree_id": prompt["message_id"], "tree_state": "ready_for_export", "prompt": prompt}, num_threads


def write_trees(path: Path) -> tuple[int, int]:
    """Write trees until they hold NUM_THREADS threads. Returns (trees, threads)."""
    rng = random.Random(0)
    num_trees = num_threads = 0
    with path.open("w", encoding="utf-8") as file:
        while num_threads < NUM_THREADS:
            made, threads = tree(rng)
            file.write(json.dumps(made, ensure_ascii=False) + "\n")
            num_trees += 1
            num_threads += threads
    return num_trees, num_threads


def main() -> None:
    with tempfile.TemporaryDirectory() as folder_name:
        folder = Path(folder_name)
        source = folder / "trees.jsonl"
        num_trees, num_threads = write_trees(source)
        stock = [sys.executable, str(ROOT / "tests/benchmarks/stock_preprocessing.py"), str(source)]
        ours = [sys.executable, str(ROOT / "scripts/preprocessing.py"), f"--input_file={source}"]
        outputs = [folder / f"ours_{part}.jsonl" for part in ("train", "val")]
        limit = [sys.executable, "-c", LIMIT, str(source), *map(str, outputs), str(folder / "limit.jsonl")]
        contestants: dict[str, Callable[[], Run]] = {
            "NeMo's algorithm": lambda: measured_process([*stock, str(folder / "stock")]),
            "ours": lambda: measured_process([*ours, f"--output_file_prefix={folder / 'ours'}"]),
            "limit: orjson parse + write": lambda: measured_process(limit),
        }
        results = in_turns(contestants, REPEATS)
        are_equal = all(
            filecmp.cmp(output, folder / output.name.replace("ours", "stock"), shallow=False) for output in outputs
        )
        peer, own, bound = results.values()
        assert peer.peak_rss_bytes and own.peak_rss_bytes
        report(
            "preprocess",
            results,
            {
                "trees": num_trees,
                "threads": num_threads,
                "input MB": source.stat().st_size / 1e6,
                "output MB": sum(output.stat().st_size for output in outputs) / 1e6,
                "outputs equal byte for byte": are_equal,
                "threads per second, ours": num_threads / own.seconds,
                "speed-up over NeMo's algorithm": peer.seconds / own.seconds,
                "share of the limit's speed": bound.seconds / own.seconds,
                "peak memory, ours over NeMo's": own.peak_rss_bytes / peer.peak_rss_bytes,
            },
        )
    if not are_equal:
        sys.exit("the outputs differ")


if __name__ == "__main__":
    main()
