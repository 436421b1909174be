"""Real servers, and real clients in environments of their own; which version passed what is told at the end."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import made_models
import pytest
from nemo_server import served
from own_environment import NotMade, python_with
from programs_of_clients import ENVIRONMENTS, GENUINE, RESULTS, VERSIONS, Program, Server


@pytest.fixture(scope="session")
def python_of() -> Callable[[str], Path]:
    """The interpreter of a client's environment; a client that cannot be fetched fails, and only that one."""

    def find(client: str) -> Path:
        try:
            return python_with(f"clients/{client}", ENVIRONMENTS[client])
        except NotMade as err:
            pytest.fail(str(err), pytrace=False)

    return find


@pytest.fixture(scope="session")
def start(python_of: Callable[[str], Path]) -> Iterator[Callable[..., Program]]:
    """A program of a client that talks to a server; started once."""
    running: dict[tuple[str, str, str], Program] = {}

    def find(client: str, program: str, server: Server) -> Program:
        key = (client, program, server.url)
        if key not in running:
            python = Path(sys.executable) if client == "nemo" else python_of(client)
            running[key] = Program(python, program, server)
        return running[key]

    with ExitStack() as stack:
        stack.callback(lambda: [program.close() for program in running.values()])
        yield find


def _served(nemo: Path, folder: Path, stack: ExitStack) -> Server:
    url = stack.enter_context(served(nemo))
    return Server(url, httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["id"], folder)


@pytest.fixture(scope="session")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A SteerLM model that has learnt to do as it is told."""
    folder = made_models.steered()
    with ExitStack() as stack:
        nemo = made_models.packed(folder, tmp_path_factory.mktemp("steered") / "steered.nemo")
        yield _served(nemo, folder, stack)


@pytest.fixture(scope="session", params=["made", "genuine"])
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A model without attributes, with a chat template of its own."""
    with ExitStack() as stack:
        if request.param == "made":
            folder = made_models.plain()
            nemo = made_models.packed(folder, tmp_path_factory.mktemp("plain") / "plain.nemo")
            yield _served(nemo, folder, stack)
        elif (GENUINE / "smollm2.nemo").is_file():
            yield _served(GENUINE / "smollm2.nemo", GENUINE / "smollm2", stack)
        else:
            pytest.skip("no genuine model: `make genuine` makes it")


# ---- the table -----------------------------------------------------------------------------------------------------

_passed: dict[str, dict[str, int]] = defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    client = dict(report.user_properties).get("client")
    if client and (report.when == "call" or report.outcome != "passed"):
        _passed[str(client)][report.outcome] += 1


@pytest.fixture(autouse=True)
def _whose(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Every test says which client it is about: the parameter of that name, or the constant of its file."""
    params = getattr(request.node, "callspec", None)
    record_property(
        "client", params.params["client"] if params and "client" in params.params else request.module.CLIENT
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _passed:
        return
    table = {name: {"version": VERSIONS[name], **counts} for name, counts in sorted(_passed.items())}
    RESULTS.write_text(json.dumps(table, indent=2) + "\n")
    terminalreporter.section("clients")
    for name, row in table.items():
        terminalreporter.write_line(f"| {name} | {' | '.join(str(value) for value in row.values())} |")
    terminalreporter.write_line(f"(client, version, passed, failed, skipped; also in {RESULTS})")
