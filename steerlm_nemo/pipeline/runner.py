"""A flow that can be stopped anywhere and goes on where it was.

A stage is up to date while its commands, what it read and what it wrote are as the manifest has them. One that was
interrupted is run again in the folder it left, so a program that resumes by itself does; if its commands or inputs have
changed in between, the folder is emptied first.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from typing import IO

from steerlm_nemo.errors import InputError
from steerlm_nemo.pipeline.flow import Flow, Stage
from steerlm_nemo.pipeline.launcher import Launcher
from steerlm_nemo.pipeline.manifest import MANIFEST, Manifest
from steerlm_nemo.pipeline.processes import Processes, StageError, free_port
from steerlm_nemo.records import atomic_output

STAGES_FILE = "stages.json"  # {name: seconds}


def run(
    flow: Flow, stages: Sequence[Stage], launcher: Launcher, *, fresh: bool = False, show: IO[str] = sys.stdout
) -> int:
    """Run these stages of the flow, those that are up to date excepted. Returns the exit code of the last in sight.

    Keeps manifest.json and logs/ in the flow's folder. With `fresh`, what an earlier run has done does not count.

    Raises:
        StageError: a command failed or a server did not start.
        InputError: an input is missing, or a stage's folder holds something else.
        KeyboardInterrupt: after every process has ended.
    """
    flow.require_inputs(stages)
    if fresh and flow.folder.exists() and not (flow.folder / MANIFEST).is_file():
        raise InputError(f"--fresh would delete what is in {flow.folder}, which no earlier run of this program made")
    manifest = Manifest(flow.folder)
    manifest.describe(flow.name, flow.parameters)
    if fresh:
        manifest.forget(stages)
    processes = Processes(flow.folder / "logs", launcher, show)
    code = 0
    for stage in stages:
        if stage.in_sight:
            stages_file = flow.folder / STAGES_FILE
            with atomic_output(stages_file) as file:
                file.write(json.dumps(manifest.seconds(flow.stages)))
            for command in stage.commands:
                # Not in the flow: who types its commands has nobody to measure them.
                code = processes.run_in_sight((*command, f"--stages_file={stages_file}"), stage.size)
        elif (seconds := _begin(stage, manifest, show)) is not None:
            _run_stage(stage, seconds, manifest, processes, show)
    return code


def _begin(stage: Stage, manifest: Manifest, show: IO[str]) -> dict[str, float] | None:
    """Say why the stage is to be run and clear what cannot be gone on from; None if it is up to date.

    Returns the seconds of its parts so far, to be added to.
    """
    entry = manifest.entry(stage)
    if entry is None:
        if stage.folder.exists():
            raise InputError(
                f"{stage.folder} is there, but no earlier run made it; stage {stage.name} would clear it. "
                "Give another output folder, or move it away."
            )
        why, goes_on = stage.about or "...", False
    elif changes := manifest.changes(stage):
        shutil.rmtree(stage.folder, ignore_errors=True)
        why, goes_on = f"again: {'; '.join(changes)}", False
    elif damage := list(manifest.damage(stage)):
        for path, _ in damage:
            path.unlink(missing_ok=True)  # a program that resumes would take it for its own
        why, goes_on = f"again: {'; '.join(f'{path} {how}' for path, how in damage)}", True
    elif entry["done"]:
        _print(show, f"[{stage.name}] done before ({sum(entry['seconds'].values()):.0f} s)")
        return None
    else:
        why, goes_on = "goes on", True
    _print(show, f"[{stage.name}] {why}")
    return manifest.begin(stage, goes_on)  # before the folder, which is known as ours by it


def _run_stage(
    stage: Stage, seconds: dict[str, float], manifest: Manifest, processes: Processes, show: IO[str]
) -> None:
    stage.folder.mkdir(parents=True, exist_ok=True)
    server_logs = {server.name: f"{stage.name}.serve-{server.name}" for server in stage.servers}
    for name in (stage.name, *server_logs.values()):
        processes.log(name).unlink(missing_ok=True)
    ports: dict[str, int] = {}
    try:
        with contextlib.ExitStack() as running:
            for server in stage.servers:
                ports[server.name] = free_port()
                log_name = server_logs[server.name]
                with _timed(seconds, log_name):
                    running.enter_context(processes.serving(server, ports[server.name], log_name))
            with _timed(seconds, stage.name):
                for command in stage.commands:
                    processes.run(command, stage.size, ports, stage.name)
        if missing := [path for path in stage.outputs if not path.is_file()]:
            raise StageError(f"it ended without writing {missing[0]}. Log: {processes.log(stage.name)}")
        manifest.finish(stage)
    except StageError as err:
        raise type(err)(f"stage {stage.name}: {err}", err.exit_code) from err
    finally:
        manifest.save()
    _print(show, f"[{stage.name}] {sum(seconds.values()):.1f} s")


@contextlib.contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the block's duration, also when it is interrupted."""
    started = time.monotonic()
    try:
        yield
    finally:
        seconds[name] = round(seconds.get(name, 0.0) + time.monotonic() - started, 1)


def _print(show: IO[str], line: str) -> None:
    print(line, file=show, flush=True)
