"""Every YAML of nemo_configs/ composes, fits the model it is for, and says how to launch it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from repository import config_names, make_commands, missing_references

from steerlm_nemo.checkpoint.llama_config import HFConfig, nemo_config
from steerlm_nemo.checkpoint.tokenizer_files import TokenizerFiles
from steerlm_nemo.config import CONFIG_DIR, load_config
from steerlm_nemo.errors import ConfigError
from steerlm_nemo.serving.process import resolve
from steerlm_nemo.toy.llama import TinyLlama
from steerlm_nemo.training import config as training_config
from steerlm_nemo.training.methods.sft import SFT

CONFIGS = sorted(CONFIG_DIR.glob("*.yaml"))
TRAINER_BASE = "gpt_sft"
INFERENCE = [path for path in CONFIGS if "gpt_model_file" in set(OmegaConf.load(path))]
TRAINING = [path for path in CONFIGS if path not in INFERENCE]
VALUE_AND_STEERLM = [path for path in TRAINING if path.stem != TRAINER_BASE]

# config.json of Meta's checkpoints: hidden_size, intermediate_size, layers, heads, key-value heads
LLAMA2 = {
    "llama2_7b": (4096, 11008, 32, 32, 32),
    "llama2_13b": (5120, 13824, 40, 40, 40),
    "llama2_70b": (8192, 28672, 80, 64, 8),
}
# The SteerLM tutorial's training commands (reference-flow 7.1), keys as Aligner spells them.
TUTORIAL = {
    "trainer.num_nodes": 1,
    "trainer.devices": 4,
    "trainer.precision": "bf16",
    "trainer.sft.max_epochs": 1,
    "trainer.sft.max_steps": 1000,
    "trainer.sft.val_check_interval": 200,
    "trainer.sft.save_interval": 200,
    "trainer.sft.limit_val_batches": 40,
    "trainer.sft.gradient_clip_val": 1.0,
    "model.tensor_model_parallel_size": 2,
    "model.pipeline_model_parallel_size": 1,
    "model.megatron_amp_O2": True,
    "model.activations_checkpoint_granularity": "selective",
    "model.activations_checkpoint_method": "uniform",
    "model.answer_only_loss": True,
    "model.data.chat": True,
    "model.data.num_workers": 0,
    "model.data.train_ds.global_batch_size": 128,
    "model.data.train_ds.micro_batch_size": 2,
    "model.data.train_ds.max_seq_length": 4096,
    "model.data.validation_ds.global_batch_size": 128,
    "model.data.validation_ds.micro_batch_size": 2,
    "model.data.validation_ds.max_seq_length": 4096,  # 4906 there, a misprint
    "model.optim.name": "distributed_fused_adam",
    "model.optim.lr": 6e-6,
    "model.optim.weight_decay": 0.01,
    "model.optim.betas": [0.9, 0.98],
    "model.optim.sched.warmup_steps": 1,
    "model.optim.sched.constant_steps": 200,
    "model.optim.sched.min_lr": 5e-6,
    "exp_manager.resume_if_exists": True,
    "exp_manager.create_checkpoint_callback": True,
    "exp_manager.checkpoint_callback_params.monitor": "val_loss",
}


def base_config(name: str) -> dict[str, Any]:
    """What our converter writes into the `.nemo` of the model that config `name` is for."""
    family = name.rpartition("_")[0]
    tokenizer = TokenizerFiles("sentencepiece", 32000, {})
    if family in LLAMA2:
        hidden, ffn, layers, heads, groups = LLAMA2[family]
        raw = {
            **{"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers},
            **{"num_attention_heads": heads, "num_key_value_heads": groups},
            **{"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
        }
    else:
        raw = TinyLlama(vocab_size=32000, max_position=4096).config()
    hf = HFConfig(raw, where=name)
    return nemo_config(hf, hf.layout(raw["vocab_size"]), 128, "bf16", tokenizer, {})


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Overrides for what every training must be told."""
    for part in ("train", "val"):
        record = {"conversations": [], "mask": "User", "system": "", "type": "TEXT_TO_VALUE"}
        (tmp_path / f"{part}.jsonl").write_text(json.dumps(record) + "\n")
    return [
        f"model.restore_from_path={nemo_folder(tmp_path / 'base', base_config('tiny'))}",
        f"model.data.train_ds.file_path={tmp_path}/train.jsonl",
        f"model.data.validation_ds.file_path={tmp_path}/val.jsonl",
        f"exp_manager.explicit_log_dir={tmp_path}/log",
    ]


def nemo_folder(folder: Path, config: dict[str, Any]) -> Path:
    folder.mkdir()
    OmegaConf.save(OmegaConf.create(config), folder / "model_config.yaml")
    return folder


def require_trainable(path: Path, overrides: list[str], base: dict[str, Any]) -> DictConfig:
    """Compose the config and put it through every check that a training starts with."""
    options = [f"--config-path={path.parent}", f"--config-name={path.stem}"]
    cfg = load_config([*options, *overrides], TRAINER_BASE)
    training_config.require_values(cfg)
    training_config.check(cfg, base, SFT)
    assert list(SFT.warnings(cfg, base)) == []
    if cfg.trainer.sft.max_steps > 0:
        training_config.check_schedule(cfg, cfg.trainer.sft.max_steps)
    return cfg


def header(path: Path) -> str:
    """The comment a config starts with."""
    return re.match(r"(?:#.*\n)*", path.read_text())[0]  # type: ignore[index]


def test_there_are_configs_of_both_kinds() -> None:
    assert {TRAINER_BASE, "llama2_7b_value", "llama2_7b_steerlm"} <= {path.stem for path in TRAINING}
    assert "megatron_gpt_inference" in {path.stem for path in INFERENCE}


@pytest.mark.parametrize("path", TRAINING, ids=lambda path: path.stem)
def test_a_training_config_fits_the_model_it_is_for(path: Path, paths: list[str]) -> None:
    require_trainable(path, paths, base_config(path.stem))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "model: {tensor_model_paralel_size: 2}",
            "bad.yaml: unknown config key model.tensor_model_paralel_size; did you mean",
        ),
        ("trainer: {devices: 3}\nmodel: {tensor_model_parallel_size: 3}", "3 does not divide the checkpoint's"),
        ("trainer: {devices: 2}\nmodel: {tensor_model_parallel_size: 4}", "= 2; set trainer.devices=4"),
        ("model: {data: {train_ds: {micro_batch_size: 3}}}", "is not divisible by"),
        ("model: {optim: {sched: {constant_steps: 900}}}\ntrainer: {sft: {max_steps: 900}}", "leave no step"),
        ("trainer: [", "not valid YAML"),
    ],
)
def test_a_config_that_cannot_run_is_caught(text: str, message: str, paths: list[str], tmp_path: Path) -> None:
    """Controls of the test above."""
    folder = tmp_path / "configs"
    folder.mkdir()
    bad = folder / "bad.yaml"
    bad.write_text(f"defaults: [{TRAINER_BASE}, _self_]\n{text}\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        require_trainable(bad, paths, base_config("tiny"))


@pytest.mark.parametrize("path", VALUE_AND_STEERLM, ids=lambda path: path.stem)
def test_a_config_takes_the_records_of_its_model_only(path: Path, paths: list[str]) -> None:
    expected = {"value": "TEXT_TO_VALUE", "steerlm": "VALUE_TO_TEXT"}[path.stem.rpartition("_")[2]]
    assert load_config([f"--config-name={path.stem}"], TRAINER_BASE).model.data.record_type == expected


def test_no_two_configs_share_a_log_folder() -> None:
    folders = [load_config([f"--config-name={p.stem}"], TRAINER_BASE).exp_manager.explicit_log_dir for p in TRAINING]
    given = [folder for folder in folders if folder is not None]
    assert len(given) >= 6 and len(set(given)) == len(given)


@pytest.mark.parametrize("kind", ["value", "steerlm"])
def test_the_7b_runs_have_the_tutorials_figures(kind: str) -> None:
    cfg = load_config([f"--config-name=llama2_7b_{kind}"], TRAINER_BASE)
    assert {key: OmegaConf.select(cfg, key) for key in TUTORIAL} == TUTORIAL


@pytest.mark.parametrize("path", INFERENCE, ids=lambda path: path.stem)
def test_an_inference_config_serves_a_checkpoint(path: Path, tmp_path: Path) -> None:
    nemo = nemo_folder(tmp_path / "model", base_config("tiny"))
    cfg = load_config([f"--config-name={path.stem}", f"gpt_model_file={nemo}"], path.stem)
    assert resolve(cfg)["num_attention_heads"] == TinyLlama(8, 8).num_heads
    assert cfg.tensor_model_parallel_size == cfg.trainer.devices * cfg.trainer.num_nodes
    assert not OmegaConf.missing_keys(cfg)


@pytest.mark.parametrize("devices", [2, 3])
def test_an_inference_config_whose_ranks_do_not_divide_the_heads_is_refused(devices: int, tmp_path: Path) -> None:
    nemo = nemo_folder(tmp_path / "model", base_config("tiny"))
    cfg = load_config([f"gpt_model_file={nemo}", f"trainer.devices={devices}"], "megatron_gpt_inference")
    if devices == 2:
        resolve(cfg)
        return
    with pytest.raises(ConfigError, match="3 does not divide"):
        resolve(cfg)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_header_says_how_to_launch_and_what_must_exist(path: Path) -> None:
    text = header(path)
    scripts = re.findall(r"python (scripts/\w+\.py)", text)
    assert scripts or make_commands(text) or "sbatch containers/" in text, "no command"
    defaults = {"scripts/train_gpt_sft.py": TRAINER_BASE, "scripts/megatron_gpt_eval.py": "megatron_gpt_inference"}
    assert path.stem in [*config_names(text), *(defaults[script] for script in scripts)], "launches something else"
    assert list(missing_references(text)) == []
