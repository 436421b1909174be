"""Slurm's `srun` as far as the flow script needs it: one process per task on this machine, with Slurm's variables.

    FAKE_SRUN_LOG=calls.jsonl python fake_srun.py SRUN_OPTION... COMMAND...

Every call is appended to FAKE_SRUN_LOG with its options, command and, when it ends, its exit code. The highest exit
code of the tasks is srun's; a signal is 128 + its number, and SIGTERM is passed on. What is in no image or mount here
is a file of this machine, so the --container options are only recorded and the working folder is the repository.

With FAKE_SRUN_CODES='{"data_clean.py": 2}' nothing is executed: a command whose script is named ends with that code,
every other one makes the files that it is asked for, and a server answers GET /health until it is stopped.
"""

from __future__ import annotations

import http.server
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    rest = sys.argv[1:]
    options = {}
    while rest and rest[0].startswith("--"):
        name, _, value = rest.pop(0).partition("=")
        options[name] = value
    call = {"options": options, "command": rest, "pid": os.getpid()}
    log(call)
    codes = os.environ.get("FAKE_SRUN_CODES")
    code = execute(options, rest) if codes is None else pretend(rest, json.loads(codes))
    log({**call, "code": code})
    return code


def log(call: dict[str, object]) -> None:
    with open(os.environ["FAKE_SRUN_LOG"], "a") as file:
        file.write(json.dumps(call) + "\n")


def execute(options: dict[str, str], command: list[str]) -> int:
    num_tasks = int(options["--ntasks"])
    tasks = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env={
                **os.environ,
                "SLURM_PROCID": str(rank),
                "SLURM_LOCALID": str(rank),
                "SLURM_NODEID": "0",
                "SLURM_NTASKS": str(num_tasks),
                "SLURM_NTASKS_PER_NODE": options["--ntasks-per-node"],
                "SLURM_NNODES": options["--nodes"],
                "SLURM_NODELIST": "127.0.0.1",
            },
        )
        for rank in range(num_tasks)
    ]
    signal.signal(signal.SIGTERM, lambda *_: [task.terminate() for task in tasks])
    codes = [task.wait() for task in tasks]
    return max(128 - code if code < 0 else code for code in codes)


def pretend(command: list[str], codes: dict[str, int]) -> int:
    script = Path(command[1]).name
    if script in codes:
        print(f"{script} was told to fail", file=sys.stderr)
        return codes[script]
    given = dict(arg.partition("=")[::2] for arg in command[2:])
    if script == "megatron_gpt_eval.py":
        http.server.HTTPServer(("127.0.0.1", int(given["port"])), Healthy).serve_forever()
    prefix = given.get("--output_file_prefix")
    log_dir = given.get("exp_manager.explicit_log_dir")
    outputs = [given.get(flag) for flag in ("--out-file", "--output_file", "--output_file_name")]
    outputs += [f"{prefix}_{part}.jsonl" for part in ("train", "val")] if prefix else []
    outputs += [f"{log_dir}/checkpoints/megatron_gpt_sft.nemo"] if log_dir else []
    for output in filter(None, outputs):
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).touch()
    return 0


class Healthy(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    sys.exit(main())
