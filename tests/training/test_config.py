"""Configurations that cannot run are refused before NeMo is imported, all problems at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steerlm_nemo.config import CONFIG_DIR, load_config
from steerlm_nemo.errors import ConfigError
from steerlm_nemo.training import config as training_config
from steerlm_nemo.training.fingerprint import fingerprint, finished_line, note_result, refuse_foreign_resume
from steerlm_nemo.training.methods.sft import SFT

BASE = {
    "encoder_seq_length": 128,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "ffn_hidden_size": 96,
    "num_layers": 2,
}


@pytest.fixture
def good(tmp_path: Path) -> list[str]:
    for name in ("base.nemo", "train.jsonl", "val.jsonl"):
        (tmp_path / name).write_text("x")
    return [
        f"model.restore_from_path={tmp_path}/base.nemo",
        f"model.data.train_ds.file_path={tmp_path}/train.jsonl",
        f"model.data.validation_ds.file_path={tmp_path}/val.jsonl",
        f"exp_manager.explicit_log_dir={tmp_path}/log",
    ]


def checked(args: list[str], base: dict[str, Any] | None = None) -> Any:
    cfg = load_config(args, "gpt_sft")
    training_config.require_values(cfg)
    training_config.check(cfg, base or BASE, SFT)
    return cfg


def test_the_defaults_run_and_take_the_context_of_the_checkpoint(good: list[str]) -> None:
    assert checked(good).model.data.validation_ds.max_seq_length == 128


def test_an_unknown_key_names_the_nearest() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown config key trainer.sft.max_step; did you mean trainer.sft.max_steps"
    ):
        load_config(["trainer.sft.max_step=3"], "gpt_sft")


def test_a_key_misspelt_in_a_users_own_yaml_is_refused(tmp_path: Path) -> None:
    """Hydra itself merges it in without a word."""
    text = (CONFIG_DIR / "gpt_sft.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(text.replace("    max_epochs: 1\n", "    max_epoch: 2\n    max_epochs: 1\n", 1))
    options = [f"--config-path={tmp_path}", "--config-name=mine"]
    with pytest.raises(
        ConfigError, match=r"mine.yaml: unknown config key trainer.sft.max_epoch; did you mean .*max_epochs"
    ):
        load_config(options, "gpt_sft")
    (tmp_path / "mine.yaml").write_text(text)
    cfg = load_config([*options, "+trainer.sft.extra.deep=1", "++model.mine=2"], "gpt_sft")
    assert (cfg.trainer.sft.extra.deep, cfg.model.mine) == (1, 2)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.optim.lr=abc", "model.optim.lr is 'abc'; it must be a number"),
        ("trainer.sft.max_steps=many", "it must be a number"),
        ("model.data.chat=yess", "it must be true or false"),
        ("model.optim.sched=CosineAnnealing", "sched is 'CosineAnnealing'; it is a section, with name, warmup_steps"),
    ],
)
def test_a_text_where_a_number_or_a_section_belongs_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config([override], "gpt_sft")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("model.data.chat_prompt_tokens.turn_start=<extra_id_1>", "quote its value"),
        ("model.optim.betas=[0.9,0.98", "quote its value"),
        ("trainer.devices", "settings are written key=value"),
        ("name=a,b", "several values: quote it"),
    ],
)
def test_the_override_that_does_not_parse_is_the_one_that_is_blamed(wrong: str, message: str) -> None:
    right = ["trainer.devices=2", r"model.data.chat_prompt_tokens.label_start=\x12", "model.optim.lr=1e-4"]
    with pytest.raises(ConfigError, match=message) as err:
        load_config([*right, wrong, "trainer.num_nodes=1"], "gpt_sft")
    assert repr(wrong) in str(err.value) and not any(other in str(err.value) for other in right)


def test_a_missing_config_lists_those_there_are() -> None:
    with pytest.raises(ConfigError, match="there are: .*gpt_sft"):
        load_config(["--config-name=gpt_stf"], "gpt_sft")


def test_a_config_that_cannot_be_read_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "broken.yaml").symlink_to("gone")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "deep.yaml").write_text("[" * 100_000)
    (tmp_path / "number.yaml").write_text("7")
    for name, message in (
        ("folder", "no config 'folder' in .*; there are: bytes, deep, number$"),
        ("broken", "no config 'broken'"),
        ("bytes", "bytes.yaml: cannot be read as a config: 'utf-8'"),
        ("deep", "deep.yaml: cannot be read as a config: maximum recursion"),
        ("number", "number.yaml: cannot be read as a config: Invalid loaded object type: int"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_config([f"--config-path={tmp_path}", f"--config-name={name}"], "gpt_sft")


def test_values_that_must_be_given_are_all_named() -> None:
    with pytest.raises(ConfigError) as err:
        training_config.require_values(load_config([], "gpt_sft"))
    for key in ("model.restore_from_path", "train_ds.file_path", "validation_ds.file_path", "explicit_log_dir"):
        assert key in str(err.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.tensor_model_parallel_size=2", "trainer.devices 1 x trainer.num_nodes 1 = 1; set trainer.devices=2"),
        ("model.data.train_ds.micro_batch_size=3", r"global_batch_size \(128\) is not divisible by micro_batch_size"),
        ("model.data.train_ds.file_path=/nowhere.jsonl", "/nowhere.jsonl: no such file; give a JSONL file"),
        ("model.data.validation_ds.file_path=/", "/ is a directory; a file is needed here; give a JSONL file"),
        ("trainer.sft.save_interval=150", "must be a multiple of val_check_interval 100"),
        ("model.data.record_type=VALUE_TO_VALUE", "must be TEXT_TO_VALUE or VALUE_TO_TEXT"),
        ("model.data.attribute_schema=nemo13", "unknown attribute schema 'nemo13'"),
        ("model.data.chat=False", "trains on conversations only"),
        ("model.peft.peft_scheme=lora", "'lora', which would have no effect: adapters are not supported"),
        ("model.optim.lr=0", "must be above 0"),
        ("model.optim.lr=null", "model.optim.lr is None; it must be a number"),
        ("model.optim=null", "model.optim is null; a training needs an optimizer"),
        ("model.optim.sched.warmup_steps=null", "model.optim.sched.warmup_steps is None; it must be a number"),
        ("trainer.sft.val_check_interval=0", "save_interval is 0; without saving"),
        ("trainer.sft.save_interval=null", "save_interval is None; without saving"),
        ("trainer.precision=fp8", "use one of 32"),
        ("model.context_parallel_size=2", "x context_parallel_size 2 = 2 ranks"),
        ("exp_manager.checkpoint_callback_params.filename=x", "lacks {step}"),
        ("+trainer.sft.inference_metrics={}", "it does not generate"),
    ],
)
def test_what_cannot_run_is_refused(good: list[str], override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked([*good, override])


def test_a_tp_that_does_not_divide_the_heads_is_refused(good: list[str]) -> None:
    with pytest.raises(ConfigError, match="4 does not divide the checkpoint's num_query_groups 2"):
        checked([*good, "model.tensor_model_parallel_size=4", "trainer.devices=4"])


def test_all_problems_are_reported_together(good: list[str]) -> None:
    with pytest.raises(ConfigError) as err:
        checked([*good, "model.tensor_model_parallel_size=2", "model.optim.lr=-1", "model.data.chat=False"])
    assert str(err.value).count("\n  - ") == 3


def test_a_constant_tail_that_leaves_no_cosine_is_refused(good: list[str]) -> None:
    """D-25: Aligner's own default of 1000 constant steps."""
    cfg = checked([*good, "model.optim.sched.constant_steps=1000"])
    with pytest.raises(ConfigError, match="constant_steps 1000 leave no step of the 1000"):
        training_config.check_schedule(cfg, 1000)
    training_config.check_schedule(cfg, 1011)


def test_markers_that_a_shell_stripped_are_taken_as_bytes_with_a_warning(good: list[str]) -> None:
    """D-01: turn_start=\\x11 unquoted arrives as the three letters x11."""
    cfg = checked([*good, "model.data.chat_prompt_tokens.turn_start=x11"])
    assert training_config.read_template(cfg).turn_start == "\x11"
    assert any("shell ate the backslash" in warning for warning in SFT.warnings(cfg, BASE))


def test_a_validation_window_wider_than_training_is_warned_of(good: list[str]) -> None:
    """The tutorial's 4906 for 4096."""
    cfg = checked([*good, "model.data.train_ds.max_seq_length=64", "model.data.validation_ds.max_seq_length=96"])
    assert any("validation_ds.max_seq_length 96" in warning for warning in SFT.warnings(cfg, BASE))


def test_a_model_is_called_after_its_run(good: list[str]) -> None:
    """Two models of a flow have two log folders, and one name of the file."""
    assert training_config.model_name(load_config(good, "gpt_sft"), SFT) == "log"
    assert training_config.model_name(load_config([*good, "name=judge"], "gpt_sft"), SFT) == "judge"


def own_schema(path: Path, maximum: int) -> list[str]:
    attributes = [{"name": "quality", "minimum": 0, "maximum": maximum, "default": 0}]
    path.write_text(json.dumps({"name": "own", "languages": [], "attributes": attributes}))
    return [f"model.data.attribute_schema={path}"]


def test_a_schema_may_be_a_file_whose_content_identifies_the_run(good: list[str], tmp_path: Path) -> None:
    cfg = checked([*good, *own_schema(tmp_path / "own.yaml", 9)])
    assert training_config.read_schema(cfg).legal_values("quality") == tuple("0123456789")
    before = fingerprint(cfg, SFT)
    own_schema(tmp_path / "own.yaml", 5)
    assert {key for key, value in fingerprint(cfg, SFT).items() if value != before[key]} == {"attribute_schema"}
    with pytest.raises(ConfigError, match="attribute schema .*none.yaml: No such file"):
        checked([*good, f"model.data.attribute_schema={tmp_path}/none.yaml"])


def test_a_folder_with_another_run_is_not_resumed(good: list[str], tmp_path: Path) -> None:
    """D-04: the tutorial trains both models in one folder, and the second ends at once."""
    cfg = checked(good)
    refuse_foreign_resume(cfg, SFT)  # nothing there: nothing to refuse
    checkpoints = tmp_path / "log" / "checkpoints"
    checkpoints.mkdir(parents=True)
    (checkpoints / "run.json").write_text(json.dumps(fingerprint(cfg, SFT)))
    refuse_foreign_resume(cfg, SFT)  # the same run
    (tmp_path / "train.jsonl").write_text("other data")
    with pytest.raises(ConfigError, match="holds another run.*\n  train_file: that run"):
        refuse_foreign_resume(cfg, SFT)


def test_a_finished_run_is_left_alone_as_long_as_its_nemo_is_what_it_wrote(good: list[str], tmp_path: Path) -> None:
    cfg = checked(good)
    assert finished_line(cfg) is None
    nemo = tmp_path / "log" / "checkpoints" / "megatron_gpt_sft.nemo"
    nemo.parent.mkdir(parents=True)
    nemo.write_bytes(b"weights")
    note_result(tmp_path / "log", 12, nemo)
    assert finished_line(cfg) == f"this run is finished: 12 steps, {nemo}; nothing was done"
    cfg.exp_manager.resume_if_exists = False
    assert finished_line(cfg) is None
    cfg.exp_manager.resume_if_exists = True
    nemo.write_bytes(b"other weights")
    assert finished_line(cfg) is None
    nemo.unlink()
    assert finished_line(cfg) is None
