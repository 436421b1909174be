"""What a training and a server read of their configs, on a base that is itself a trained model of format version 1."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import live
import pytest
from read_keys import recording
from runs import ROOT, overrides

from steerlm_nemo.accepted_keys import ACCEPTED
from steerlm_nemo.checkpoint.archive import read_config
from steerlm_nemo.config import CONFIG_DIR, all_keys, load_config
from steerlm_nemo.model_kind import GRADER, SteerLMFormat
from steerlm_nemo.serving.process import resolve

pytest.importorskip("nemo_aligner", reason="needs the training stack: nemo_toolkit, megatron-core, nemo-aligner")

TRAINING, INFERENCE = "gpt_sft", "megatron_gpt_inference"
# Sections that are handed on whole, key by key, to what knows them by name.
HANDED_ON = (
    "exp_manager.wandb_logger_kwargs.",  # Lightning's WandbLogger
    "model.data.chat_prompt_tokens.",  # ChatTemplate, which refuses others
    "model.optim.",  # the optimizer and its schedule
    "inference.",  # the request of a run without a server
)
# Fields of Megatron Core's TransformerConfig, which NeMo takes from a copy of the model's config.
TRANSFORMER = {"model.hidden_dropout", "model.attention_dropout"}


def unread(name: str, read: set[str]) -> set[str]:
    """Keys of a config with a value of their own that nobody read and nothing takes whole."""
    keys = all_keys(CONFIG_DIR / f"{name}.yaml")
    values = {key for key in keys if not any(other.startswith(f"{key}.") for other in keys)}
    return {key for key in values - read - TRANSFORMER if not key.startswith(HANDED_ON)}


@pytest.fixture(scope="module")
def own_schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schema") / "own.yaml"
    attributes = [{"name": name, "minimum": 0, "maximum": 4, "default": 0} for name in ("quality", "toxicity")]
    path.write_text(json.dumps({"name": "own", "languages": [], "attributes": attributes}))
    return path


@pytest.fixture(scope="module")
def trained(
    version_1_nemo: Path, records: dict[str, Path], own_schema: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The log folder of a training of three steps; `read.json` in it has the keys it read."""
    log_dir = tmp_path_factory.mktemp("value")
    settings = {
        "trainer__sft__max_steps": 3,
        "trainer__sft__val_check_interval": 3,
        "model__optim__sched__warmup_steps": 1,
        "model__data__attribute_schema": own_schema,
    }
    command = [sys.executable, ROOT / "tests/support/read_keys.py", log_dir / "read.json"]
    command += [ROOT / "scripts/train_gpt_sft.py", *overrides(version_1_nemo, records, log_dir, **settings)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return log_dir


@pytest.mark.slow
def test_a_training_reads_every_key_but_those_that_are_accepted(trained: Path) -> None:
    read = set(json.loads((trained / "read.json").read_text()))
    accepted = ACCEPTED[TRAINING].keys()
    assert unread(TRAINING, read) <= accepted
    # What Lightning and exp_manager take as arguments counts as read, whatever becomes of it. Of the model's keys
    # those in the table are looked at by nobody, but that NeMo wants to know whether the peft scheme is qlora.
    assert {key for key in accepted if key.startswith("model.")} & read == {"model.peft.peft_scheme"}


@pytest.mark.slow
def test_a_model_of_version_1_can_be_trained_on_with_a_schema_of_ones_own(trained: Path, version_1_nemo: Path) -> None:
    config = read_config(trained / "checkpoints" / "megatron_gpt_sft.nemo")
    stored = SteerLMFormat.from_dict(config["steerlm"])
    assert config["steerlm"]["version"] == 2
    assert stored.kind is GRADER and stored.schema.name == "own" and stored.schema.keys() == ("quality", "toxicity")
    assert config["steerlm_provenance"]["base"] == str(version_1_nemo)
    assert config["steerlm_provenance"]["name"] == trained.name


@pytest.mark.slow
def test_a_model_of_version_1_is_served_as_the_kind_it_is_and_every_key_is_read(
    version_1_nemo: Path, tmp_path: Path
) -> None:
    with live.open_listener(0) as free:
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "tests/support/read_keys.py", tmp_path / "read.json"]
    command += [ROOT / "scripts/megatron_gpt_eval.py", f"gpt_model_file={version_1_nemo}", f"port={port}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        while True:
            assert server.poll() is None, server.communicate()[0]
            try:
                (model,) = httpx.get(f"http://127.0.0.1:{port}/v1/models", trust_env=False).json()["data"]
                break
            except httpx.TransportError:
                time.sleep(0.2)
    finally:
        server.terminate()
        log, _ = server.communicate(timeout=60)
    assert server.returncode == 0, log
    assert (model["id"], model["kind"]) == ("old_value", "grader")
    with recording() as of_prompts:  # which a server has no use for
        resolve(load_config([f"gpt_model_file={version_1_nemo}", "server=False", "prompts=[a]"], INFERENCE))
    read = set(json.loads((tmp_path / "read.json").read_text())) | of_prompts
    assert unread(INFERENCE, read) <= ACCEPTED[INFERENCE].keys()


def test_a_key_that_nobody_reads_is_found() -> None:
    """Control: without the reads of a run, every value is unread but those handed on whole."""
    missing = unread(TRAINING, set())
    assert {"trainer.devices", "model.seed", "model.data.num_workers"} <= missing
    assert not missing & {"model.optim.betas", "model.hidden_dropout"}
    with recording() as read:
        assert load_config([], "gpt_sft").model.seed == 1234
    assert "model.seed" in read and "model.data.num_workers" not in read
