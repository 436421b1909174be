"""Records of a made-up grading task, and runs of the real training script on them."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def record(chance: random.Random, record_type: str) -> dict[str, Any]:
    quality = chance.randrange(5)
    answer = "It is four." if quality > 2 else "I do not know."
    return {
        "conversations": [
            {"value": f"What is {chance.randrange(9)}+{chance.randrange(9)}?", "from": "User", "label": None},
            {"value": answer, "from": "Assistant", "label": f"quality:{quality},toxicity:0"},
        ],
        "system": "Be brief.\n\n",
        "mask": "User",
        "type": record_type,
    }


def write_records(path: Path, count: int, record_type: str, seed: int = 0) -> Path:
    chance = random.Random(seed)
    path.write_text("".join(json.dumps(record(chance, record_type)) + "\n" for _ in range(count)))
    return path


def overrides(base_nemo: Path, records: dict[str, Path], log_dir: Path, **extra: Any) -> list[str]:
    """Arguments of a short training; `extra` keys are spelled with double underscores for dots."""
    settings = {
        "trainer.precision": 32,
        "trainer.sft.max_epochs": 3,
        "trainer.sft.max_steps": 12,
        "trainer.sft.val_check_interval": 4,
        "model.restore_from_path": base_nemo,
        "model.data.train_ds.file_path": records["train"],
        "model.data.validation_ds.file_path": records["val"],
        "model.data.train_ds.global_batch_size": 16,
        "model.data.train_ds.micro_batch_size": 8,
        "model.optim.lr": 1e-3,
        "model.optim.sched.warmup_steps": 2,
        "exp_manager.explicit_log_dir": log_dir,
        **{key.replace("__", "."): value for key, value in extra.items()},
    }
    return [f"{key}={value}" for key, value in settings.items()]


def train_command(*args: str) -> list[str]:
    return [sys.executable, str(ROOT / "scripts/train_gpt_sft.py"), *args]


def train(*args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(train_command(*args), capture_output=True, text=True, env=env, timeout=300)


def losses(log_dir: Path) -> dict[int, float]:
    """`train/loss` by step, over all TensorBoard files of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[int, float] = {}
    for path in sorted(log_dir.rglob("events*")):
        events = EventAccumulator(str(path))
        events.Reload()
        if "train/loss" in events.Tags()["scalars"]:
            found.update({event.step: event.value for event in events.Scalars("train/loss")})
    return found
