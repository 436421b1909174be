"""A flow as the commands a person would type."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Iterator, Sequence

from steerlm_nemo.pipeline.flow import Command, Stage
from steerlm_nemo.pipeline.launcher import Launcher, Size
from steerlm_nemo.pipeline.processes import with_ports

WIDTH = 118


def shell_script(stages: Sequence[Stage], launcher: Launcher) -> str:
    """A paragraph per stage: a comment, then its commands, each on a line. bash can run the whole."""
    return "\n\n".join("\n".join(_paragraph(stage, launcher)) for stage in stages)


def _paragraph(stage: Stage, launcher: Launcher) -> Iterator[str]:
    comment = f"{stage.name}: {stage.about}"
    yield from textwrap.wrap(comment, WIDTH, initial_indent="# ", subsequent_indent="# ")
    ports = {server.name: server.port for server in stage.servers}

    def line(command: Command, size: Size) -> str:
        return shlex.join(with_ports(word, ports) for word in launcher.argv(command, size))

    for server in stage.servers:
        yield line(server.command, server.size) + " &"
        health = f"http://127.0.0.1:{server.port}/health"
        yield f"curl -s --retry 900 --retry-delay 2 --retry-connrefused {health}  # waits until it serves"
    for command in stage.commands:
        yield line(command, stage.size)
    if stage.servers:
        yield " ".join(["kill", *(f"%{number}" for number in range(1, len(stage.servers) + 1))]) + "; wait"
