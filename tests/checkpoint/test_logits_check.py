"""The comparison with transformers that a conversion ends with, and what becomes of the file when it fails."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from llamas import ROOT, MakeLlama, convert_quietly, export_quietly

from steerlm_nemo.checkpoint import mapping
from steerlm_nemo.checkpoint.archive import read_config
from steerlm_nemo.checkpoint.from_hf import convert, plan_conversion
from steerlm_nemo.compat import capabilities
from steerlm_nemo.errors import CheckpointError
from steerlm_nemo.models import logits_check as logits
from steerlm_nemo.models.logits_check import Agreement, logits_check, reason_to_skip
from steerlm_nemo.ranks import die_with_parent

STACK = "needs the training stack: nemo_toolkit, megatron-core, nemo-aligner"


def checked(folder: Path, out: Path, precision: str | None = None) -> list[str]:
    """What a checked conversion reports."""
    said: list[str] = []
    plan = plan_conversion(folder, precision)
    convert(plan, out, said.append, logits_check(plan, folder, said.append))
    return said


@pytest.mark.slow
def test_a_conversion_in_half_precision_is_compared_before_it_gets_its_name(llama3_style: Path, tmp_path: Path) -> None:
    """bf16 with llama3 rope and a tokenizer.json: rounded alike on both sides, so the bar of fp32 holds."""
    pytest.importorskip("nemo", reason=STACK)
    script = ROOT / "scripts" / "convert_hf_llama_to_nemo.py"
    command = [sys.executable, script, "--in-file", llama3_style, "--out-file", tmp_path / "x.nemo"]
    # A job of several ranks around it must not draw the comparison in.
    done = subprocess.run(
        [*command, "--precision", "bf16"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "RANK": "1", "WORLD_SIZE": "2", "SLURM_NTASKS": "2", "SLURM_PROCID": "1"},
    )
    assert done.returncode == 0, done.stderr
    compared = next(line for line in done.stdout.splitlines() if line.startswith("logits of 128 tokens differ by"))
    assert float(compared.split()[6]) <= 1e-4
    assert done.stdout.splitlines()[-1].startswith("wrote ")
    assert read_config(tmp_path / "x.nemo")["precision"] == "bf16"


@pytest.mark.slow
def test_a_wrong_conversion_is_refused_and_the_old_file_stays(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("nemo", reason=STACK)
    out = tmp_path / "model.nemo"
    out.write_bytes(b"the old file")
    in_a_row = [
        dataclasses.replace(rule, order=mapping.in_order) if rule.order is mapping.by_query_group else rule
        for rule in mapping.RULES
    ]
    monkeypatch.setattr(mapping, "RULES", tuple(in_a_row))
    with pytest.raises(CheckpointError, match="NeMo does not compute what transformers does"):
        checked(llama, out)
    assert out.read_bytes() == b"the old file" and list(tmp_path.iterdir()) == [out]


def test_a_comparison_that_breaks_off_is_a_message_with_its_last_words_and_leaves_nothing(
    make_llama: MakeLlama, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    folder = make_llama(num_hidden_layers=1)
    plan = plan_conversion(folder, None)
    check = logits_check(plan, folder, lambda line: None)

    def check_without_its_source(path: Path) -> None:
        (folder / "model.safetensors").unlink()
        check(path)

    with pytest.raises(CheckpointError) as refusal:
        convert(plan, tmp_path / "model.nemo", lambda line: None, check_without_its_source)
    message = str(refusal.value)
    assert "could not be compared (exit code 1, transformers: OSError:" in message and "no file named" in message
    assert "\n" not in message
    assert list(tmp_path.iterdir()) == []


def test_without_the_memory_the_file_is_written_and_the_user_told(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logits, "_free_memory", lambda: 1_000_000_000)
    said = checked(llama, tmp_path / "model.nemo")
    assert any(
        "logits not compared with transformers: the comparison needs about 2.00 GB of memory, 1.00 GB are free" in line
        for line in said
    )
    assert read_config(tmp_path / "model.nemo")["num_layers"] == 3


def test_without_a_package_or_the_disk_the_comparison_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    assert reason_to_skip(0, 0) is None
    assert "unpacking needs 10000000000.00 GB in" in str(reason_to_skip(0, 10**19))
    monkeypatch.setattr(capabilities, "PINS", {**capabilities.PINS, "package-that-nobody-made": "1"})
    assert str(reason_to_skip(0, 0)).startswith("package-that-nobody-made not installed here")


def test_the_bar_is_1e4_and_grows_only_with_logits_beyond_ten() -> None:
    assert Agreement(9.9e-5, 5.0, 128).holds and not Agreement(1.1e-4, 5.0, 128).holds
    assert Agreement(2.9e-4, 30.0, 128).holds and not Agreement(3.1e-4, 30.0, 128).holds
    assert not Agreement(float("nan"), 5.0, 128).holds


@pytest.mark.slow
def test_a_model_with_a_tokenizer_json_round_trips_and_is_served_as_transformers_runs_it(
    llama3_style: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nemo", reason=STACK)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    nemo = convert_quietly(llama3_style, tmp_path / "model.nemo")
    back = export_quietly(nemo, tmp_path / "back")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        assert (back / name).read_bytes() == (llama3_style / name).read_bytes()
    assert json.loads((back / "config.json").read_text())["rope_scaling"]["rope_type"] == "llama3"

    tokenizer, model = AutoTokenizer.from_pretrained(back), AutoModelForCausalLM.from_pretrained(back)
    prompt = "The mapping is a table — each row has both names."
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    generated = model.generate(ids, max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=0)[0]

    from steerlm_nemo.serving.listener import open_listener

    with open_listener(0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "scripts" / "megatron_gpt_eval.py", f"gpt_model_file={nemo}", "server=True"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, f"port={port}"], stdout=log, stderr=log, preexec_fn=die_with_parent)
    try:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
            try:
                httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                break
            except httpx.TransportError:
                time.sleep(0.1)
        body = {"sentences": [prompt], "tokens_to_generate": 12, "min_tokens_to_generate": 12}
        body |= {"greedy": True, "add_BOS": False}
        answer = httpx.put(f"http://127.0.0.1:{port}/generate", json=body, timeout=60, trust_env=False).json()
    finally:
        server.terminate()
        server.wait()
    assert answer["token_ids"][0] == generated.tolist()
    assert answer["sentences"][0] == tokenizer.decode(generated, skip_special_tokens=True)
