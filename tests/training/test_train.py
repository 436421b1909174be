"""The training script as users run it: real ranks over gloo, real signals, NeMo-Aligner's loop."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from in_process import run_script
from runs import losses, overrides, train, train_command, write_records

from steerlm_nemo.attributes import HELPSTEER5, NEMO12_LANG
from steerlm_nemo.checkpoint.archive import open_nemo, read_config
from steerlm_nemo.checkpoint.identity import name_of
from steerlm_nemo.model_kind import GRADER, SteerLMFormat
from steerlm_nemo.template import ChatTemplate

pytest.importorskip("nemo_aligner", reason="needs the training stack: nemo_toolkit, megatron-core, nemo-aligner")

TWO_RANKS = ["trainer.devices=2", "model.tensor_model_parallel_size=2"]


def nemo_of(log_dir: Path) -> Path:
    return log_dir / "checkpoints" / "megatron_gpt_sft.nemo"


def weights(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a `.nemo` by key, read by torch's own checkpoint reader."""
    with open_nemo(path) as nemo:
        reader = dcp.FileSystemReader(nemo.dir / "model_weights")
        metadata = reader.read_metadata().state_dict_metadata
        state = {
            key: torch.empty(entry.size, dtype=entry.properties.dtype)
            for key, entry in metadata.items()
            if hasattr(entry, "size")
        }
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.fixture(scope="session")
def finished(base_nemo: Path, records: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log folder of an uninterrupted run of 12 steps with TP 2."""
    log_dir = tmp_path_factory.mktemp("finished")
    result = train(*overrides(base_nemo, records, log_dir), *TWO_RANKS)
    assert result.returncode == 0, result.stderr[-3000:]
    return log_dir


@pytest.mark.slow
def test_two_ranks_learn_what_one_rank_learns(
    finished: Path, base_nemo: Path, records: dict[str, Path], tmp_path: Path
) -> None:
    result = train(*overrides(base_nemo, records, tmp_path, trainer__sft__max_steps=6))
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = losses(tmp_path), losses(finished)
    # The first steps share a schedule up to warm-up; later the cosine of the shorter run falls faster.
    assert all(abs(one[step] - two[step]) < 1e-4 for step in range(3))
    assert two[11] < two[0] - 0.5
    logged = [json.loads(line) for line in (finished / "metrics/metrics.jsonl").read_text().splitlines()]
    assert {line["step"]: line["train/loss"] for line in logged if "train/loss" in line} == pytest.approx(two)
    assert [line["step"] for line in logged if "val/loss" in line] == [4, 8, 12]
    assert (finished / "metrics/loss.svg").is_file()


@pytest.mark.slow
def test_the_result_says_what_it_was_trained_for(finished: Path, base_nemo: Path) -> None:
    config = read_config(nemo_of(finished))
    fmt = SteerLMFormat.from_dict(config["steerlm"])
    assert fmt == SteerLMFormat(ChatTemplate(), NEMO12_LANG, GRADER)
    assert config["target"].endswith("GPTSFTModel")
    # What was switched off for this machine must be on for the next one.
    assert config["transformer_engine"] is True and config["optim"]["name"] == "distributed_fused_adam"
    assert config["steerlm_provenance"]["base"] == str(base_nemo)
    with open_nemo(nemo_of(finished)) as nemo:
        assert name_of(nemo) == finished.name  # the files of two models of a flow have the same
    changed, base = weights(nemo_of(finished)), weights(base_nemo)
    assert changed.keys() == base.keys()
    assert all(not torch.equal(changed[key], base[key]) for key in base)


@pytest.mark.slow
def test_a_finished_run_that_is_started_again_says_so_and_changes_nothing(
    finished: Path, base_nemo: Path, records: dict[str, Path]
) -> None:
    def state() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in finished.rglob("*")}

    before = state()
    result = train(*overrides(base_nemo, records, finished), *TWO_RANKS)
    assert result.returncode == 0 and not result.stderr
    assert result.stdout == f"this run is finished: 12 steps, {nemo_of(finished)}; nothing was done\n"
    assert state() == before


@pytest.mark.slow
def test_a_run_that_is_stopped_and_killed_ends_with_the_same_weights(
    finished: Path, base_nemo: Path, records: dict[str, Path], tmp_path: Path
) -> None:
    """SIGTERM after the first checkpoint (saves and exits with 75), SIGKILL after the second, then to the end.

    Before the first start lies what a kill in the first save leaves, before the last what one between the end of a
    save and the removal of the checkpoint before it does. NeMo alone never gets past either.
    """
    args = [*overrides(base_nemo, records, tmp_path), *TWO_RANKS]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    torn = tmp_path / "checkpoints" / "megatron_gpt_sft--val_loss=9.000-step=4-consumed_samples=64-epoch=0-last"
    torn.mkdir(parents=True)
    (torn / "common.pt").write_bytes(b"half of")
    torn.with_name(f"{torn.name}-unfinished").touch()
    for number, step in ((signal.SIGTERM, 4), (signal.SIGKILL, 8)):
        log = (tmp_path / f"{number.name}.log").open("w")
        process = subprocess.Popen(train_command(*args), env=env, stdout=log, stderr=log)
        until = time.monotonic() + 200
        while not list(tmp_path.glob(f"checkpoints/*step={step}-*-last/metadata.json")):
            assert process.poll() is None, (tmp_path / f"{number.name}.log").read_text()[-3000:]
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(number)
        code = process.wait(timeout=120)
        assert code in ((75, 0) if number is signal.SIGTERM else (-9,))
        time.sleep(3)  # the ranks of a killed launcher end by themselves, saving
    (log_of_first,) = tmp_path.rglob("SIGTERM.log")  # NeMo moves what lies in the folder of a run that goes on
    assert f"removed {torn}: the run was killed while it was being written" in log_of_first.read_text()
    (newest,) = (tmp_path / "checkpoints").glob("*-last")
    older = shutil.copytree(newest, newest.with_name(re.sub(r"step=\d+", "step=1", newest.name)))
    result = train(*args)
    assert result.returncode == 0, result.stderr[-3000:]
    assert f"removed {older}: {newest.name} was complete" in result.stdout
    assert "resuming at step" in result.stdout
    resumed, whole = weights(nemo_of(tmp_path)), weights(nemo_of(finished))
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    assert not list((tmp_path / "checkpoints").glob(".*"))


@pytest.mark.slow
def test_the_tutorials_own_arguments_train_under_torchrun(base_nemo: Path, tmp_path: Path) -> None:
    """Every key of the tutorial's training command, small sizes, markers as an unquoted shell leaves them.

    The records are HelpSteer's: their report tells that they are of another schema than the tutorial's OpenAssistant.
    """
    rated = [
        {"prompt": f"What is {i}+{i}?", "response": "It is four.", **dict.fromkeys(HELPSTEER5.names, i % 5)}
        for i in range(160)
    ]
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rated))
    flags = [f"--input_file={tmp_path}/rated.jsonl", f"--output_file_prefix={tmp_path}/h", "--split_ratio=0.7"]
    assert run_script("preprocessing", *flags).code == 0
    records = {side: tmp_path / f"h_{side}.jsonl" for side in ("train", "val")}
    tutorial = """
    trainer.num_nodes=1 trainer.devices=2 trainer.precision=bf16 trainer.sft.max_steps=6
    trainer.sft.limit_val_batches=40 trainer.sft.val_check_interval=3 trainer.sft.save_interval=3
    model.megatron_amp_O2=True model.tensor_model_parallel_size=2 model.pipeline_model_parallel_size=1
    model.optim.lr=6e-4 model.optim.name=distributed_fused_adam model.optim.weight_decay=0.01
    model.optim.sched.constant_steps=2 model.optim.sched.warmup_steps=1 model.optim.sched.min_lr=5e-6
    model.answer_only_loss=True model.activations_checkpoint_granularity=selective
    model.activations_checkpoint_method=uniform model.data.chat=True model.data.num_workers=0
    model.data.chat_prompt_tokens.turn_start=x11 model.data.chat_prompt_tokens.label_start=x12
    model.data.chat_prompt_tokens.system_turn_start=x00
    model.data.train_ds.max_seq_length=128 model.data.train_ds.micro_batch_size=2
    model.data.train_ds.global_batch_size=16 model.data.train_ds.add_eos=False model.data.train_ds.hf_dataset=True
    model.data.validation_ds.max_seq_length=128 model.data.validation_ds.micro_batch_size=2
    model.data.validation_ds.global_batch_size=16 model.data.validation_ds.add_eos=False
    model.data.validation_ds.hf_dataset=True
    exp_manager.create_wandb_logger=False exp_manager.wandb_logger_kwargs.project=steerlm
    exp_manager.wandb_logger_kwargs.name=value exp_manager.resume_if_exists=True
    exp_manager.resume_ignore_no_checkpoint=True exp_manager.create_checkpoint_callback=True
    exp_manager.checkpoint_callback_params.monitor=val_loss
    """.split()  # noqa: SIM905
    paths = [
        f"model.restore_from_path={base_nemo}",
        f"model.data.train_ds.file_path={records['train']}",
        f"model.data.train_ds.index_mapping_dir={tmp_path}/index",
        f"model.data.validation_ds.file_path={records['val']}",
        f"model.data.validation_ds.index_mapping_dir={tmp_path}/index",
        f"exp_manager.explicit_log_dir={tmp_path}/log",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*launcher, *train_command(*tutorial, *paths)[1:]], capture_output=True, text=True, env=env, timeout=300
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stderr.count("shell ate the backslash") == 3
    seen = losses(tmp_path / "log")
    assert len(seen) == 6 and seen[5] < seen[0]
    fmt = SteerLMFormat.from_dict(read_config(nemo_of(tmp_path / "log"))["steerlm"])
    assert fmt == SteerLMFormat(ChatTemplate(), HELPSTEER5, GRADER)


@pytest.mark.slow
def test_pipeline_parallel_ranks_learn_the_same(
    finished: Path, base_nemo: Path, records: dict[str, Path], tmp_path: Path
) -> None:
    args = overrides(base_nemo, records, tmp_path, trainer__sft__max_steps=4)
    result = train(*args, "trainer.devices=2", "model.pipeline_model_parallel_size=2")
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = losses(tmp_path), losses(finished)
    assert all(abs(one[step] - two[step]) < 1e-4 for step in range(3))


@pytest.mark.slow
def test_fewer_records_than_a_batch_is_one_clear_message(
    base_nemo: Path, records: dict[str, Path], tmp_path: Path
) -> None:
    """D-24: ZeroDivisionError in the reference."""
    few = write_records(tmp_path / "few.jsonl", 5, "TEXT_TO_VALUE")
    result = train(*overrides(base_nemo, {**records, "train": few}, tmp_path / "log"))
    assert result.returncode == 2
    assert "has 5 usable records, fewer than model.data.train_ds.global_batch_size 16" in result.stderr
    assert "Traceback" not in result.stderr
    assert not nemo_of(tmp_path / "log").exists()


@pytest.mark.slow
def test_a_misspelt_optimizer_is_named_with_the_nearest(
    base_nemo: Path, records: dict[str, Path], tmp_path: Path
) -> None:
    result = train(*overrides(base_nemo, records, tmp_path), "model.optim.name=adamww")
    assert result.returncode == 2
    assert "model.optim.name: there is no 'adamww'; did you mean adamw?" in result.stderr
    assert "Traceback" not in result.stderr
