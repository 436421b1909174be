"""What this machine and installation can do, printed at the start of every run and saved with it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import asdict, dataclass
from typing import Any

PINS = {"nemo_toolkit": "2.3.2", "megatron-core": "0.12.3", "nemo-aligner": "0.7.0"}


@dataclass(frozen=True)
class Capabilities:
    """`device` is cpu or cuda; `backend` the torch.distributed backend; `layer_spec` what layers are built of."""

    device: str
    device_name: str
    backend: str
    layer_spec: str
    optimizer: str
    transformer_engine: str | None
    apex: bool
    versions: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        """The report as people read it."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return [
            f"device {self.device} ({self.device_name}), backend {self.backend}",
            f"layers {self.layer_spec}; distributed_fused_adam runs as {self.optimizer}",
            f"Transformer Engine {self.transformer_engine or 'absent'}, Apex {'present' if self.apex else 'absent'}",
            versions + _pin_note(self.versions),
        ]


def detect() -> Capabilities:
    """Look at what is installed. Imports torch, not NeMo."""
    import torch

    cuda = torch.cuda.is_available()
    has_te = importlib.util.find_spec("transformer_engine") is not None
    # `apex` on PyPI is an unrelated package; NVIDIA's brings the amp_C extension.
    has_apex = importlib.util.find_spec("amp_C") is not None
    return Capabilities(
        device="cuda" if cuda else "cpu",
        device_name=torch.cuda.get_device_name()
        if cuda
        else f"{platform.machine()}, {torch.get_num_threads()} threads",
        backend="nccl" if cuda else "gloo",
        layer_spec="Transformer Engine" if cuda and has_te else "Megatron Core local with torch attention",
        optimizer="Apex distributed Adam" if cuda and has_apex else "torch AdamW",
        transformer_engine=_version("transformer-engine") if has_te else None,
        apex=has_apex,
        versions={name: _version(name) or "absent" for name in (*PINS, "torch")},
    )


def missing_packages(*others: str) -> list[str]:
    """Which of the training stack's packages, and of `others`, are not installed. Imports none of them."""
    return [name for name in (*PINS, *others) if _version(name) is None]


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _pin_note(versions: dict[str, str]) -> str:
    other = [f"{name} {pin}" for name, pin in PINS.items() if versions.get(name) != pin]
    return f"  WARNING: tested with {', '.join(other)}" if other else ""
