"""A training method is a row: nothing outside it knows which methods there are."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf, open_dict

import steerlm_nemo
from steerlm_nemo.config import CONFIG_DIR, load_config
from steerlm_nemo.errors import ConfigError
from steerlm_nemo.training import config as training_config
from steerlm_nemo.training.fingerprint import fingerprint
from steerlm_nemo.training.methods import METHODS
from steerlm_nemo.training.methods.sft import SFT

BASE = {"encoder_seq_length": 128, "num_attention_heads": 4, "num_layers": 2}
OTHER = replace(SFT, name="other", problems=lambda cfg: iter(["the row's own problem"]))


@pytest.fixture
def cfg(tmp_path: Path) -> DictConfig:
    """A config whose loop settings are in `trainer.other`, and there is no other section of such settings."""
    for name in ("base.nemo", "train.jsonl", "val.jsonl"):
        (tmp_path / name).write_text("x")
    overrides = [f"model.data.{part}.file_path={tmp_path}/train.jsonl" for part in ("train_ds", "validation_ds")]
    cfg = load_config([*overrides, f"model.restore_from_path={tmp_path}/base.nemo"], SFT.default_config)
    cfg.exp_manager.explicit_log_dir = str(tmp_path / "log")
    OmegaConf.resolve(cfg)
    with open_dict(cfg):
        cfg.trainer.other = cfg.trainer.pop(SFT.name)
    return cfg


def test_a_row_has_its_section_in_the_config_that_lists_its_keys() -> None:
    assert [*METHODS] == [method.name for method in METHODS.values()]
    for method in METHODS.values():
        assert (CONFIG_DIR / f"{method.default_config}.yaml").is_file()
        assert method.settings(load_config([], method.default_config)).max_epochs == 1


def test_another_row_is_checked_in_its_own_section_and_by_its_own_rules(cfg: DictConfig) -> None:
    cfg.trainer.other.save_interval = 150
    with pytest.raises(ConfigError) as err:
        training_config.check(cfg, BASE, OTHER)
    problems = str(err.value).splitlines()[1:]
    assert problems == [
        "  - trainer.other.save_interval 150 must be a multiple of val_check_interval 100",
        "  - the row's own problem",
    ]


def test_a_run_is_not_resumed_by_another_method(cfg: DictConfig) -> None:
    training_config.check(cfg, BASE, replace(OTHER, problems=lambda cfg: iter(())))
    with open_dict(cfg):
        cfg.trainer[SFT.name] = cfg.trainer.other
    ours, theirs = fingerprint(cfg, SFT), fingerprint(cfg, OTHER)
    assert {key for key in ours if ours[key] != theirs[key]} == {"method"}


def test_no_file_but_its_own_spells_a_method() -> None:
    package = Path(steerlm_nemo.__file__).parent
    spelled = re.compile(rf"trainer\.({'|'.join(METHODS)})\b|[\"']({'|'.join(METHODS)})[\"']")
    found = {path for path in package.rglob("*.py") if spelled.search(path.read_text())}
    assert found == {package / "training" / "methods" / f"{name}.py" for name in METHODS}
