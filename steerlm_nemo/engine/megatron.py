"""The Megatron engine: works on the rows of many requests together, on all ranks of a tensor-parallel group.

Rank 0 plans each forward pass and sends the plan as integers (no pickle). Every rank runs it; rank 0 draws the tokens,
which the others learn with the next plan. So whatever fails outside the model fails on rank 0 only, and ranks cannot
drift apart (D-18). What fails inside the model ends the server: the other ranks may be in a collective without partner.
Rank 0 says every second that it is there, so that the others know a rank 0 that hangs from one without work.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from steerlm_nemo.engine.cache import KVCache
from steerlm_nemo.engine.plan import StepPlan
from steerlm_nemo.engine.protocol import EngineCounters, Event, ModelInfo, Sample, ScoreRequest
from steerlm_nemo.engine.scheduler import Scheduler
from steerlm_nemo.engine.watch import Watch
from steerlm_nemo.errors import ConfigError
from steerlm_nemo.models.loading import LoadedModel
from steerlm_nemo.ranks import EXIT_RANK_FAILED

logger = logging.getLogger("steerlm_nemo.serving")

_IDLE_TIMEOUT = timedelta(days=365)  # followers wait for work without limit; a dead rank 0 closes their connection
_REASON_FIRST_S = 1.0  # rank 0 ends after a rank that it lost, so that the launcher shows that one's reason
_ALIVE_S = 1.0  # between two words of a rank 0 without work
_RANK_0_FIRST_S = 3.0  # the others give up later: rank 0 has clients to tell
_END, _ALIVE = 0, 1  # lengths of what is no plan
_HEAD = 4096  # integers of the first message of a plan; what is longer needs a second one


class RankLostError(RuntimeError):
    """Ranks can no longer work together; the whole job has to end, with EXIT_RANK_FAILED."""


@dataclass(frozen=True)
class EngineSettings:
    """`engine` of nemo_configs/megatron_gpt_inference.yaml."""

    max_batch_rows: int  # rows in the model at a time
    max_step_tokens: int  # of one forward pass; a longer prompt is computed in pieces
    kv_cache_gb: float  # per rank; what running rows leave of it keeps prefixes of ended ones
    prefix_reuse: bool


class MegatronEngine:
    """`engine.protocol.Engine` on a loaded model. Create it on every rank; rank 0 steps it, the others `follow`.

    Raises:
        ConfigError: the cache is too small for one row of the model's context.
    """

    def __init__(self, loaded: LoadedModel, name: str, settings: EngineSettings) -> None:
        from steerlm_nemo.compat.inference import CachedModel

        self._precision = loaded.precision
        model = loaded.nemo_model.model
        context_length = int(loaded.config.get("encoder_seq_length") or loaded.config["max_position_embeddings"])
        # Ended rows keep a line each, as long as there are places.
        num_lines = 4 * settings.max_batch_rows
        affordable = int(settings.kv_cache_gb * 2**30 / CachedModel.bytes_per_token(model))
        if affordable < context_length:
            needed = context_length * CachedModel.bytes_per_token(model) / 2**30
            raise ConfigError(
                f"engine.kv_cache_gb={settings.kv_cache_gb} holds {affordable} tokens, but the model's context is "
                f"{context_length}; set engine.kv_cache_gb to {needed:.3g} or more"
            )
        num_places = min(affordable, num_lines * context_length)
        self._model = CachedModel(model, num_places, context_length)
        # line, position -> place in the cache; what is not set is never looked at, but must be a place.
        self._table = torch.zeros((num_lines, context_length), dtype=torch.int64, device=self._model.device)
        # A gloo group of its own: waiting for work must neither time out nor occupy the accelerator.
        self._num_ranks = dist.get_world_size()
        self._plan_group = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT) if self._num_ranks > 1 else None
        self._talking = threading.Lock()  # to the other ranks, with a plan or with a word
        self._closed = threading.Event()
        self.info = ModelInfo(
            name=name,
            tokenizer=loaded.tokenizer,
            vocab_size=loaded.tokenizer.vocab_size,
            context_length=context_length,
            format=loaded.format,
            report={
                **loaded.capabilities.as_dict(),
                "tp_size": loaded.tp_size,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "kv_cache_tokens": num_places,
            },
            identity=loaded.identity,
            own_template=loaded.own_template,
        )
        cache = KVCache(num_lines, num_places, context_length)
        self._scheduler = Scheduler(
            cache, self.info, settings.max_batch_rows, settings.max_step_tokens, settings.prefix_reuse
        )
        if self._num_ranks > 1 and dist.get_rank() == 0:
            threading.Thread(target=self._say_alive, name="alive", daemon=True).start()

    @property
    def counters(self) -> EngineCounters:
        return self._scheduler.counters

    def add(self, work: Sample | ScoreRequest) -> int:
        return self._scheduler.add(work)

    def cancel(self, row: int) -> None:
        self._scheduler.cancel(row)

    def step(self) -> Sequence[Event]:
        """Rank 0 only. A failure inside the model fails the running rows if this is the only rank.

        Raises:
            RankLostError: with several ranks it is the end of the engine.
        """
        plan = self._scheduler.plan()
        if plan is None:
            return []
        try:
            with self._talking:
                if self._num_ranks > 1:
                    self._send(plan.pack())
                logits = self._forward(plan)
        except Exception as err:
            if self._num_ranks > 1:
                # The other ranks may be inside a collective that this one left, or this one in one that they left:
                # nothing can be said to them any more. Ending is what they notice, and the launcher then ends them.
                self._closed.set()
                logger.critical("rank 0 failed inside the model or lost another rank", exc_info=True)
                time.sleep(_REASON_FIRST_S)
                raise RankLostError("rank 0 failed inside the model or lost another rank; the server ends") from err
            logger.exception("the model failed; the %d rows it worked on are given up", len(plan.lines))
            return self._scheduler.fail_running(err)
        return self._scheduler.take(logits)

    def follow(self, give_up_s: float = math.inf) -> None:
        """The life of every other rank: run each plan, until rank 0 calls `close`.

        It ends the process, with EXIT_RANK_FAILED and the reason, where the model fails, or where for `give_up_s` (and
        the moment that rank 0 gets to tell its clients) no forward pass has ended and rank 0 has said nothing.
        Signals are rank 0's to act on: it may still have responses to finish, and needs its partners for them.
        """
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        rank = dist.get_rank()

        def give_up() -> None:
            logger.critical("rank %d: rank 0 has been silent for %.0f s; the server ends", rank, watch.still_s)
            os._exit(EXIT_RANK_FAILED)

        watch = Watch(give_up_s + _RANK_0_FIRST_S, give_up)
        watch.start()
        watch.moved()
        try:
            while (packed := self._receive()) is not None:
                watch.moved()
                if len(packed) > _ALIVE:
                    self._forward(StepPlan.unpack(packed))
                    watch.moved()
        except Exception:
            logger.critical(
                "rank %d failed inside the model or lost another rank; the server ends", rank, exc_info=True
            )
            os._exit(EXIT_RANK_FAILED)
        watch.stop()

    def close(self) -> None:
        """Let the other ranks end. Rank 0 only."""
        self._closed.set()
        if self._num_ranks > 1:
            with self._talking:
                self._send(np.array([_END]))

    def _say_alive(self) -> None:
        while not self._closed.wait(_ALIVE_S):
            # Not during a forward pass: then the others are in it, too.
            if self._talking.acquire(blocking=False):
                try:
                    if not self._closed.is_set():
                        self._send(np.array([_ALIVE]))
                except RuntimeError:
                    return  # a rank is gone; the next step finds that out, and says so
                finally:
                    self._talking.release()

    @torch.inference_mode()
    def _forward(self, plan: StepPlan) -> torch.Tensor:
        """Logits [wanted, V]."""
        from steerlm_nemo.compat.inference import group_rows

        device = self._table.device
        line, position, place = (torch.from_numpy(part).to(device) for part in plan.table)
        self._table[line, position] = place
        rows = self._table[torch.from_numpy(plan.lines).to(device), : int(plan.totals.max())]
        cached = self._model
        groups = group_rows(plan.num_new, plan.totals, rows, cached.repeats, cached.dtype, cached.window)
        amp = {"16": torch.float16}.get(self._precision)
        with torch.autocast(device.type, dtype=amp or torch.bfloat16, enabled=amp is not None):
            return self._model.logits(
                torch.from_numpy(plan.tokens).to(device),
                torch.from_numpy(plan.positions).to(device),
                torch.from_numpy(plan.places).to(device),
                groups,
                torch.from_numpy(plan.wanted).to(device),
            )

    def _send(self, packed: np.ndarray) -> None:
        head = np.zeros(_HEAD, np.int64)
        head[: len(packed)] = packed[:_HEAD]
        dist.broadcast(torch.from_numpy(head), src=0, group=self._plan_group)
        if len(packed) > _HEAD:
            dist.broadcast(torch.from_numpy(packed[_HEAD:].copy()), src=0, group=self._plan_group)

    def _receive(self) -> np.ndarray | None:
        """The next plan, packed, or a single number where rank 0 is only there; None at the end."""
        head = torch.zeros(_HEAD, dtype=torch.int64)
        dist.broadcast(head, src=0, group=self._plan_group)
        length = int(head[0])
        if length <= _HEAD:
            return None if length == _END else head[:length].numpy()
        rest = torch.zeros(length - _HEAD, dtype=torch.int64)
        dist.broadcast(rest, src=0, group=self._plan_group)
        return torch.cat([head, rest]).numpy()


def settings_from(config: Any) -> EngineSettings:
    """Check the `engine` section of the server's config.

    Raises:
        ConfigError: every value that cannot be, together.
    """
    problems = [
        f"engine.{key} is {config[key]!r}; it must be a number greater than 0"
        for key in ("max_batch_rows", "max_step_tokens", "kv_cache_gb")
        if isinstance(config[key], bool) or not isinstance(config[key], (int, float)) or not config[key] > 0
    ]
    if problems:
        raise ConfigError("\n".join(problems))
    return EngineSettings(
        int(config.max_batch_rows), int(config.max_step_tokens), float(config.kv_cache_gb), bool(config.prefix_reuse)
    )
