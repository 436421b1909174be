"""Does NeMo compute from a new `.nemo` what transformers computes from its source? Asked before the file gets its name.

Both sides hold the stored weights in fp32. So bf16 and fp16 models are rounded alike before either computes, and the
bar still tells a mistake (a head in the wrong place is off by whole units) from the order of summation.
The comparison runs in a process of its own, on the CPU: a crash there is a message here, and its memory is given back.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlm_nemo.checkpoint.from_hf import Conversion, gigabytes
from steerlm_nemo.checkpoint.hf_weights import is_safetensors
from steerlm_nemo.checkpoint.llama_config import read_hf_config
from steerlm_nemo.compat.capabilities import missing_packages
from steerlm_nemo.errors import CheckpointError

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
# Sums in another order differ in proportion to what is summed; above 10 the bar grows with the logits.
RELATIVE_TOLERANCE = 1e-5
NUM_TOKENS = 128
_UNTOUCHED = "nothing was put in place, an older .nemo is untouched, and --no_check writes it all the same"
_LIBRARIES_BYTES = 2_000_000_000
_FOREIGN_RANKS = (
    "SLURM_",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NODE_RANK",
    "MASTER_",
    "TORCHELASTIC",
)


@dataclass(frozen=True)
class Agreement:
    """How far two sets of logits are apart."""

    difference: float
    largest_logit: float
    num_tokens: int

    @property
    def bar(self) -> float:
        return max(TOLERANCE, RELATIVE_TOLERANCE * self.largest_logit)

    @property
    def holds(self) -> bool:
        return self.difference <= self.bar  # false for NaN


def logits_check(conversion: Conversion, hf_dir: Path, report: Callable[[str], None]) -> Callable[[Path], None]:
    """A function that compares a written `.nemo` with its source, or reports why it does not.

    It raises CheckpointError when they differ, or when one of them could not be computed.
    """

    def check(nemo_path: Path) -> None:
        needed = memory_needed(conversion)
        if reason := reason_to_skip(needed, nemo_path.stat().st_size):
            report(f"logits not compared with transformers: {reason}")
            return
        started = time.monotonic()
        report(
            f"comparing logits of NeMo and transformers in fp32, needing about {gigabytes(needed)} of memory "
            "(--no_check leaves this out)"
        )
        agreement = _compare_in_a_process(hf_dir, nemo_path, conversion)
        figures = (
            f"logits of {agreement.num_tokens} tokens differ by {agreement.difference:.1e} at most "
            f"(bar {agreement.bar:.0e}, largest logit {agreement.largest_logit:.1f})"
        )
        if not agreement.holds:
            raise CheckpointError(
                f"{hf_dir}: NeMo does not compute what transformers does: {figures}; please report this model; "
                f"{_UNTOUCHED}"
            )
        report(f"{figures}; {time.monotonic() - started:.1f} s")

    return check


def memory_needed(conversion: Conversion) -> int:
    """Bytes: one side at a time holds the model in fp32, and a tensor more while it is loaded."""
    largest = max(math.prod(place.shape) for place in conversion.tensors.values())
    return 4 * (conversion.num_parameters + largest) + _LIBRARIES_BYTES


def reason_to_skip(needed_bytes: int, archive_bytes: int) -> str | None:
    """Why the comparison cannot run here; None if it can."""
    if missing := missing_packages("transformers"):
        return f"{', '.join(missing)} not installed here (pip install 'steerlm-nemo[cpu]')"
    if (free := _free_memory()) < needed_bytes:
        return f"the comparison needs about {gigabytes(needed_bytes)} of memory, {gigabytes(free)} are free"
    # NeMo reads folders only, so the archive is unpacked.
    if (free := shutil.disk_usage(tempfile.gettempdir()).free) < archive_bytes:
        folder = tempfile.gettempdir()
        return f"unpacking needs {gigabytes(archive_bytes)} in {folder}, which has {gigabytes(free)}; TMPDIR moves it"
    return None


def _free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of its control group where that is less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):  # not this version of control groups, or "max"
            continue
    return free


def _compare_in_a_process(hf_dir: Path, nemo_path: Path, conversion: Conversion) -> Agreement:
    from steerlm_nemo.ranks import die_with_parent

    with tempfile.TemporaryDirectory(prefix="logits-") as folder:
        result, log = Path(folder, "result.json"), Path(folder, "log")
        # A GPU adds in TF32 by default, far above the bar. And this job has one rank, whoever started the converter.
        env = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN_RANKS)}
        command = [sys.executable, "-m", __name__, str(hf_dir), str(nemo_path), conversion.dtype, str(result)]
        with log.open("wb") as output:
            code = subprocess.run(
                command,
                stdout=output,
                stderr=output,
                env={**env, "CUDA_VISIBLE_DEVICES": ""},
                preexec_fn=die_with_parent,
            ).returncode
        if code != 0 or not result.is_file():
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            said = result if result.is_file() else log
            lines = [line.strip() for line in said.read_text(errors="replace").splitlines() if line.strip()]
            reason = f", {_short(lines[-1])}" if lines else ""
            raise CheckpointError(f"{hf_dir}: the logits could not be compared ({how}{reason}); {_UNTOUCHED}")
        return Agreement(**json.loads(result.read_text()))


def _short(text: str) -> str:
    return text if len(text) <= 300 else f"{text[:300]} ..."


def main() -> None:
    hf_dir, nemo_path, dtype, result = sys.argv[1:]
    side = "transformers"
    try:
        import torch

        config = read_hf_config(Path(hf_dir)).raw
        length = min(NUM_TOKENS, config["max_position_embeddings"])
        token_ids = torch.randint(0, config["vocab_size"], (length,), generator=torch.Generator().manual_seed(0))
        theirs = transformers_logits(Path(hf_dir), token_ids, getattr(torch, dtype))
        side = "NeMo"

        from steerlm_nemo.models.loading import load_for_inference

        ours = nemo_logits(load_for_inference(nemo_path, 1, "32").nemo_model, token_ids)[:, : theirs.shape[1]]
        agreement = {
            "difference": (ours - theirs).abs().max().item(),
            "largest_logit": theirs.abs().max().item(),
            "num_tokens": length,
        }
    except Exception as err:  # whatever either library raises is the reason that the parent gives
        Path(result).write_text(f"{side}: {type(err).__name__}: {' '.join(str(err).split())}")
        sys.stdout.flush()
        os._exit(1)
    Path(result).write_text(json.dumps(agreement))
    sys.stdout.flush()
    os._exit(0)  # at an ordinary exit gloo's threads now and then abort a process that has done its work


def transformers_logits(folder: Path, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits [S, V] of S token ids by transformers, in fp32 with the weights rounded to `dtype`.

    The parameters are those that we read: an installed transformers 4 does not know how 5 spells them.
    """
    import torch
    import transformers

    config = read_hf_config(folder)
    model_class = getattr(transformers, config.architecture.name)
    model = model_class.from_pretrained(
        folder,
        config=model_class.config_class.from_dict(config.for_transformers_4()),
        torch_dtype=dtype,
        attn_implementation="eager",
        use_safetensors=is_safetensors(folder),
    ).float()
    with torch.no_grad():
        return model(token_ids.reshape(1, -1)).logits[0]


def nemo_logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Logits [S, V] of S token ids by a loaded MegatronGPTModel; every tensor-parallel rank calls this and has them."""
    import torch
    from megatron.core import parallel_state

    length = token_ids.numel()
    future = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    with torch.no_grad():
        shard = model.model(token_ids.reshape(1, -1), torch.arange(length).reshape(1, -1), future).contiguous()
    shards = [torch.empty_like(shard) for _ in range(parallel_state.get_tensor_model_parallel_world_size())]
    torch.distributed.all_gather(shards, shard, group=parallel_state.get_tensor_model_parallel_group())
    return torch.cat(shards, dim=-1)[0].contiguous()


if __name__ == "__main__":
    main()
