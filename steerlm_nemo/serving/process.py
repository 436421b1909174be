"""What every rank of a server does: load the model, then serve (rank 0) or follow (all others)."""

from __future__ import annotations

import gc
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from omegaconf import DictConfig

from steerlm_nemo.checkpoint.archive import check_nemo
from steerlm_nemo.compat import leave_a_core
from steerlm_nemo.errors import ConfigError, ServerError
from steerlm_nemo.models.loading import check_parallelism
from steerlm_nemo.ranks import EXIT_RANK_FAILED

_REASON_FIRST_S = 1.0  # rank 0 ends after a rank that it lost, so that the launcher shows that one's reason


def overrides_from(arguments: Sequence[str]) -> list[str]:
    """The command line as overrides: `--served_model_name NAME`, a flag of other servers, is `served_model_name=NAME`.

    The name is the text that was typed: 2024_01 is no number, and after the flag null is no null.

    Raises:
        ConfigError: there is no name.
    """
    overrides = []
    remaining = iter(arguments)
    for argument in remaining:
        key, equals, name = argument.partition("=")
        if key in ("--served_model_name", "--served-model-name"):
            name = _quoted(name if equals else next(remaining, ""))
        elif key != "served_model_name":
            overrides.append(argument)
            continue
        elif name != "null" and name[:1] not in ("'", '"'):
            name = _quoted(name)
        if name in ("", "''", '""'):
            raise ConfigError(f"{key} needs a name: {key}=NAME")
        overrides.append(f"served_model_name={name}")
    return overrides


def _quoted(text: str) -> str:
    """As a text in Hydra's grammar, where backslashes escape only before a quotation mark."""
    return "'" + re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + ("\\'" if end[2] else ""), text) + "'"


def resolve(cfg: DictConfig) -> Mapping[str, Any]:
    """Fill in the sizes left at -1, refuse what cannot run, return the checkpoint's model config.

    Raises:
        CheckpointError, ConfigError: the checkpoint cannot be read, or sizes do not fit.
    """
    config = check_nemo(cfg.gpt_model_file)
    num_ranks = cfg.trainer.devices * cfg.trainer.num_nodes
    if cfg.pipeline_model_parallel_size in (-1, None):
        cfg.pipeline_model_parallel_size = 1
    if cfg.tensor_model_parallel_size in (-1, None):
        cfg.tensor_model_parallel_size = num_ranks
    check_parallelism(config, cfg.tensor_model_parallel_size, cfg.pipeline_model_parallel_size, num_ranks)
    if cfg.compat not in (None, "nemo1.23"):
        raise ConfigError(f"compat is {cfg.compat!r}; it must be nemo1.23 or left out")
    if not cfg.server and not cfg.prompts:
        raise ConfigError(
            "server=False continues `prompts`, and there are none; give prompts='[\"...\"]' or server=True"
        )
    return config


def run(cfg: DictConfig) -> None:
    """Serve until told to stop, or continue `cfg.prompts` once, and end the process. Every rank calls this.

    Where the engine died the exit code is not 0, EXIT_RANK_FAILED if there are several ranks.

    Raises:
        InputError: the port is taken, or the token file cannot be read; found before the model is loaded.
    """
    from steerlm_nemo.engine.watch import patience_from
    from steerlm_nemo.serving.front_door import settings_from as http_settings_from
    from steerlm_nemo.serving.listener import open_listener

    is_first = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))) == 0
    http, patience = http_settings_from(cfg.http), patience_from(cfg.engine)
    listener = None
    if is_first and cfg.server:
        listener = open_listener(cfg.port, cfg.host, has_token=http.token is not None)

    leave_a_core()
    import torch

    from steerlm_nemo.engine.megatron import MegatronEngine, RankLostError, settings_from
    from steerlm_nemo.models.loading import load_for_inference

    settings = settings_from(cfg.engine)
    precision = cfg.trainer.precision or ("bf16" if torch.cuda.is_available() else "32")
    precision = str(precision).removesuffix("-mixed")
    loaded = load_for_inference(cfg.gpt_model_file, cfg.tensor_model_parallel_size, precision)
    engine = MegatronEngine(loaded, str(cfg.served_model_name or loaded.name), settings)
    # A step makes thousands of small tuples and no cycles; looking through them after every 700 is time for nothing.
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    if not is_first:
        engine.follow(patience.give_up_s)
        _leave()
    print("\n".join(loaded.capabilities.lines()), flush=True)
    try:
        if listener is None:
            _continue_prompts(cfg, engine)
        else:
            from steerlm_nemo.serving.app import build_app
            from steerlm_nemo.serving.listener import serve

            app = build_app(
                engine, compat=cfg.compat, max_batch_rows=settings.max_batch_rows, http=http, patience=patience
            )
            serve(app, listener, engine.info.name, http.drain_s)
    except (ServerError, RankLostError) as err:
        print(f"error: {err}", file=sys.stderr, flush=True)
        if cfg.tensor_model_parallel_size == 1:
            _leave(ServerError.exit_code)
        time.sleep(_REASON_FIRST_S)
        _leave(EXIT_RANK_FAILED)
    finally:
        engine.close()
    _leave()


def _leave(code: int = 0) -> NoReturn:
    """End this rank now.

    At an ordinary exit gloo's threads are torn down while the other rank's are; the one that comes second finds its
    connection closed and, now and then, aborts the process. A thread that hangs in a collective would never be left.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _continue_prompts(cfg: DictConfig, engine: Any) -> None:
    from omegaconf import OmegaConf

    from steerlm_nemo.engine.protocol import complete
    from steerlm_nemo.serving.requests.generate import GenerateRequest
    from steerlm_nemo.serving.routes.generate import completion_text
    from steerlm_nemo.serving.samples.generate import generate_samples

    body: dict[str, Any] = OmegaConf.to_container(cfg.inference)  # type: ignore[assignment]
    request = GenerateRequest.from_json({"sentences": list(cfg.prompts), **body}, len(cfg.prompts))
    for completion in complete(engine, generate_samples(request, engine.info)):
        print(completion_text(completion, engine.info))
