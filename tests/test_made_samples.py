"""What stands in for genuine data is made the same each time, and is right where it says what a model computes."""

from __future__ import annotations

from pathlib import Path

import genuine_shaped
import made_llama
import numpy as np
from safetensors.numpy import load_file


def test_the_samples_are_the_same_each_time(made_data: Path, tmp_path: Path) -> None:
    genuine_shaped.write_samples(tmp_path)
    files = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.jsonl*")]
    assert len(files) == 13
    # gzip notes the time of writing in the bytes 4 to 8.
    assert all((tmp_path / file).read_bytes()[8:] == (made_data / file).read_bytes()[8:] for file in files)


def test_the_made_samples_have_the_folders_of_the_genuine_ones(genuine_data: Path, made_data: Path) -> None:
    made = {path.relative_to(made_data) for path in made_data.rglob("*") if path.is_file()}
    assert not {file for file in made if not (genuine_data / file).is_file()}


def test_expected_logits_are_computed_as_a_c_program_computed_those_of_a_genuine_llama(genuine_data: Path) -> None:
    folder = genuine_data / "tiny-llama-checkpoint"
    weights, expected = load_file(folder / "model.safetensors"), load_file(folder / "expected_logits.safetensors")
    for name in ("seq1", "seq3", "seq5"):
        logits = made_llama.logits_of(weights, expected[f"{name}.input_ids"])
        assert np.abs(logits - expected[f"{name}.logits"]).max() < 1e-4
