"""The one room for adapting the pinned NVIDIA stack; nothing else asks what is installed.

`prepare()` must run before the first import of NeMo. With CUDA present it changes nothing.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from steerlm_nemo.compat.capabilities import Capabilities, detect
from steerlm_nemo.compat.registry import CompatError

__all__ = ["Capabilities", "CompatError", "leave_a_core", "prepare", "quiet_logs"]

_prepared: Capabilities | None = None


def prepare() -> Capabilities:
    """Make NeMo, NeMo-Aligner and Megatron Core importable and runnable here. Idempotent.

    Raises:
        CompatError: a package is missing, or an upstream symbol that must be adapted is gone.
    """
    global _prepared
    if _prepared is not None:
        return _prepared
    capabilities = detect()
    if capabilities.device == "cpu":
        # NeMo asks for it as a string and stops outside NGC; 24.07 is the container Aligner 0.7.0 was built on.
        os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "24.07")
        # Replaced torch factories confuse dynamo's table of known objects, and nothing here compiles.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    try:
        with _no_garbage_collection():
            importlib.import_module("nemo.collections.nlp")
            from nemo.utils import logging as nemo_logging

            level = nemo_logging.getEffectiveLevel()
            nemo_logging.setLevel(logging.ERROR)  # importing Aligner logs a line about TensorRT
            importlib.import_module("nemo_aligner")
            nemo_logging.setLevel(level)
    except ImportError as err:
        raise CompatError(
            f"the training stack cannot be imported ({err}). Run `make setup`, or: pip install 'steerlm-nemo[cpu]'"
        ) from err
    if capabilities.device == "cpu":
        from steerlm_nemo.compat import cpu

        cpu.apply()
    _prepared = capabilities
    return capabilities


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """For imports: NeMo's 8,000 modules are nearly all garbage collection sees, again and again, and none is garbage.

    Frozen afterwards, they are not looked at when the process ends either: a start and an end of 6.4 s instead of 9.3.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def leave_a_core() -> None:
    """Let torch's CPU operations take all cores but one, unless OMP_NUM_THREADS says how many. Call it before torch is
    imported: `torch.set_num_threads` does not reach the matrix products of other threads.

    A server's HTTP thread and its clients need that core. With as many threads as cores, each of the thousands of small
    parallel regions of a step spins until a thread that something else keeps off its core has had its turn: on two busy
    cores the same work took 2 s with one thread and 60 s with two.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores - 1)))


def quiet_logs(verbose: bool) -> None:
    """Keep NeMo's and Megatron's remarks off the terminal unless asked for; warnings of substance stay.

    NeMo prints one warning per config field it does not find, about 60 at every start, and Megatron a line per
    batch-size change. Errors are always shown.
    """
    if verbose:
        return
    from nemo.utils import logging as nemo_logging

    nemo_logging.setLevel(logging.ERROR)
    for name in ("megatron.core", "lightning.pytorch", "lightning.fabric", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
