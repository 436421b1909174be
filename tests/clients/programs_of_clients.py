"""The clients, the environments they need, and programs that use them beside a server."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from own_environment import CACHE, TORCH, environment

HERE = Path(__file__).parent
GENUINE = CACHE / "genuine"
RESULTS = CACHE / "clients/results.json"
# Client -> what pip installs for it, one call each.
ENVIRONMENTS = {
    "openai-1": ["openai==1.109.1"],
    "openai-2": ["openai==2.54.0"],
    "openai-3": ["openai==3.57.0"],
    "litellm": ["litellm==1.110.2"],
    "langchain": ["langchain-openai==1.7.4"],
    "lm-eval": ["lm-eval[api]==0.4.13 transformers==5.24.0"],
    "guidellm": [TORCH, "guidellm==0.8.1"],
}
VERSIONS = {"nemo-skills": "bodies", "nemo": "nemo_toolkit 2.3.2"} | {
    name: installs[-1].split()[0] for name, installs in ENVIRONMENTS.items()
}


@dataclass(frozen=True)
class Server:
    url: str
    model: str
    folder: Path  # the Hugging Face folder that was converted


class Raised(Exception):
    """What the client raised: its class, and what it says."""

    def __init__(self, name: str, says: str) -> None:
        super().__init__(f"{name}: {says}")
        self.name, self.says = name, says


class Program:
    """A program of `programs/`, in an environment, that talks to a server: its functions by name."""

    def __init__(self, python: Path, program: str, server: Server) -> None:
        command = [str(python), str(HERE / "worker.py"), str(HERE / "programs" / program), server.url, server.model]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=client_environment(),
        )

    def __call__(self, function: str, **arguments: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        print(json.dumps({"call": function, "with": arguments}), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        if "raised" in answer:
            raise Raised(answer["raised"], answer["says"])
        return answer["value"]

    def close(self) -> None:
        self._process.communicate(timeout=30)  # its input ends


def client_environment() -> dict[str, str]:
    """Of a client's process: no hub, no proxy, and a key that no server here asks for."""
    return {**environment(), "OPENAI_API_KEY": "none", "NO_PROXY": "127.0.0.1"}
