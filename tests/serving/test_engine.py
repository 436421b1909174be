"""The Megatron engine against NeMo's own `generate`, on the genuine tiny Llama, with one and two ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steerlm_nemo.tokenizer import SentencePieceTokenizer

pytest.importorskip("nemo", reason="needs the training stack: nemo_toolkit, megatron-core, nemo-aligner")

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("engine_worker.py")
TEXTS = (
    "Once upon a time",
    "One day, Tom and Sam went to the park.\nThey saw a dog.",
    "Lily",
    'The cat sat on the mat and said, "Hello!" Then the sun came out and all the animals of the wood began to sing.',
    "She",
    "Ben had a big red ball. He",
)
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def tiny_nemo(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("engine") / "tiny.nemo"
    source = shared_data / "tiny-llama-checkpoint"
    command = [sys.executable, ROOT / "scripts/convert_hf_llama_to_nemo.py", "--in-file", source, "--out-file", out]
    subprocess.run(command, check=True, capture_output=True)
    return out


def results(tiny_nemo: Path, folder: Path, shared_data: Path, tp_size: int) -> dict[str, Any]:
    tokenizer = SentencePieceTokenizer(shared_data / "tiny-llama-checkpoint" / "tokenizer.model")
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in TEXTS]
    (folder / "prompts.json").write_text(json.dumps([prompts, NUM_TOKENS]))
    program = (
        "import sys; from steerlm_nemo.training.launch import launch_ranks; "
        f"sys.exit(launch_ranks(sys.argv[1:], {tp_size}))"
    )
    arguments = [WORKER, tiny_nemo, folder / "prompts.json", folder / "results.json"]
    run = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 2])
def test_greedy_output_is_nemos_token_by_token_in_any_company(
    tiny_nemo: Path, shared_data: Path, tmp_path: Path, tp_size: int
) -> None:
    found = results(tiny_nemo, tmp_path, shared_data, tp_size)
    ours, theirs = found["ours"], found["theirs"]
    expected = [answer["token_ids"] for answer in theirs]
    assert ours["together"] == expected
    assert ours["alone"] == expected
    assert ours["mixed"] == expected
    for mine, answer in zip(ours["logprob"], theirs, strict=True):
        assert len(mine) == len(answer["logprob"])
        assert max(abs(a - b) for a, b in zip(mine, answer["logprob"], strict=True)) < 1e-4
    # A seed decides what is drawn, and drawing differs from greedy.
    assert ours["drawn"] == ours["drawn again"]
    assert ours["drawn"] != ours["together"]
    # D-17: in the reference a repetition penalty without compute_logprob does nothing.
    assert len(set(ours["penalised"])) == len(ours["penalised"])
    # D-18: a batch that fails on every rank leaves them in step.
    assert "could not draw a token" in ours["failure"]
    assert ours["after the failure"] == expected
