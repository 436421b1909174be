"""One rank of a training run, by any method: NeMo-Aligner's trainer around one of its models.

The loop, optimizer, schedule, checkpoints and loggers are NVIDIA's (nemo_aligner.algorithms, NeMo's exp_manager). Here:
what goes in, what comes out, and the refusals the reference lacks (D-03 to D-06, D-11, D-24).
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from steerlm_nemo.checkpoint.archive import read_config
from steerlm_nemo.compat import prepare, quiet_logs
from steerlm_nemo.compat.model_config import for_this_machine
from steerlm_nemo.ranks import this_rank
from steerlm_nemo.training.config import check_schedule
from steerlm_nemo.training.fingerprint import fingerprint, note_result
from steerlm_nemo.training.method import Method
from steerlm_nemo.training.resume import StoppedEarlyError, check_log_folder, clear_leftovers


def run(cfg: DictConfig, method: Method) -> None:
    """Train on this rank until done. `cfg` has passed `training.config.check`.

    Raises:
        SteerLMError: the data, the checkpoint or a resumed run does not fit the config.
        StoppedEarlyError: stopped by a signal or `exp_manager.max_time_per_run`, after saving.
    """
    # --- prepare ---
    log_dir = Path(cfg.exp_manager.explicit_log_dir)
    clear_leftovers(cfg)  # of ranks that others started, whichever comes first
    check_log_folder(log_dir)  # before NeMo starts; what exp_manager then chooses is checked once more
    identity = fingerprint(cfg, method)  # of what was asked for, before it is adapted to this machine
    capabilities = prepare()
    quiet_logs(verbose=cfg.verbose)
    report("\n".join(capabilities.lines()))

    from nemo_aligner.utils.train_script_utils import (
        add_custom_checkpoint_callback,
        retrieve_custom_trainer_state_dict,
    )

    from steerlm_nemo.training.experiment import open_experiment, save_run_files
    from steerlm_nemo.training.loaders import build_loaders, num_steps
    from steerlm_nemo.training.metrics import MetricsFile
    from steerlm_nemo.training.model import check_optimizer, load_base, merge_model_config, set_up_optimizer
    from steerlm_nemo.training.save import save_nemo, saved_config
    from steerlm_nemo.training.trainer import RunTimer

    base_config = read_config(cfg.model.restore_from_path)
    intended = merge_model_config(base_config, cfg.model, method.splits(cfg).train)
    cfg.model = for_this_machine(intended, capabilities)
    check_optimizer(cfg.model.optim)
    ptl_trainer, logger = open_experiment(cfg, method)

    # --- model ---
    model, tokenizer, artifacts = load_base(cfg, method, ptl_trainer)

    # --- data ---
    state = retrieve_custom_trainer_state_dict(ptl_trainer)  # None: a run from its beginning
    data = method.load_data(cfg, tokenizer, report)
    loaders = build_loaders(cfg, method, data, state["consumed_samples"] if state else 0, report)
    steps = num_steps(cfg, method, data)
    check_schedule(cfg, steps)

    # --- loop ---
    optimizer, scheduler = set_up_optimizer(ptl_trainer, model, loaders, steps)
    checkpoint_callback = add_custom_checkpoint_callback(ptl_trainer, model)
    if this_rank() == 0:
        save_run_files(cfg, identity, capabilities)
    logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
    timer = RunTimer(cfg.exp_manager.max_time_per_run)
    signal.signal(signal.SIGTERM, timer.request_stop)
    signal.signal(signal.SIGINT, timer.request_stop)
    trainer = method.trainer_class()(
        cfg=method.settings(cfg),
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        train_dataloader=loaders.train,
        val_dataloader=loaders.validation,
        test_dataloader=None,
        logger=logger,
        ckpt_callback=checkpoint_callback,
        run_timer=timer,
    )
    if state is not None:
        trainer.load_state_dict(state)
        report(f"resuming at step {trainer.step} of {trainer.max_steps}")
    if this_rank() == 0:
        logger.loggers.append(MetricsFile(log_dir, trainer.step))
    started = time.monotonic()
    trainer.fit()
    if trainer.step < trainer.max_steps:
        raise StoppedEarlyError(
            f"stopped at step {trainer.step} of {trainer.max_steps} "
            + (
                "and saved; run the same command again to go on"
                if cfg.exp_manager.create_checkpoint_callback
                else "and not saved: exp_manager.create_checkpoint_callback is false. The same command begins anew"
            )
        )

    # --- save ---
    if cfg.exp_manager.checkpoint_callback_params.save_nemo_on_train_end:
        target = log_dir / "checkpoints" / f"{cfg.name}.nemo"
        save_nemo(model, saved_config(base_config, intended, model, data.format, cfg, method), artifacts, target)
        if this_rank() == 0:
            note_result(log_dir, trainer.step, target)
        report(f"trained {trainer.step} steps in {time.monotonic() - started:.0f} s; wrote {target}")


def report(line: str) -> None:
    """Say something once, not once per rank."""
    if this_rank() == 0:
        print(line, flush=True)
