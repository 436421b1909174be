"""A flow of nemo_configs/flows/ as stages whose commands and paths are filled in; the keys are in docs/flows.md.

Needs PyYAML and nothing else outside the standard library: on a cluster, a flow is run where only its commands have the
training stack.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from steerlm_nemo.errors import ConfigError, InputError
from steerlm_nemo.pipeline.launcher import ONE_TASK, SCRIPTS, Size
from steerlm_nemo.records import require_file

REQUIRED = "???"
_NAME = re.compile(r"\{([A-Za-z_][\w-]*)\}")
_PORT = re.compile(r"\{([A-Za-z_][\w-]*)\.port\}")


class _Kind(NamedTuple):
    what: str
    fits: Callable[[object], bool]


def _scalar(value: object) -> bool:
    return isinstance(value, (str, int, float))


def _list_of(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(map(kind, value))


def _mapping_of(kind: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(kind, value.values()))


# Checked by hand: pydantic is not where a flow may have to run.
_TEXT = _Kind("a text", lambda value: isinstance(value, str))
_TEXTS = _Kind("a list of texts", _list_of(_TEXT.fits))
_COUNT = _Kind("a number or a parameter", lambda value: isinstance(value, (int, str)))
_FLAG = _Kind("true or false", lambda value: isinstance(value, bool))
_MAPPINGS = _Kind("a mapping of mappings", _mapping_of(lambda value: isinstance(value, dict)))
_STAGES = _Kind(
    "a list of names, or of mappings with a name",
    _list_of(lambda value: isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("name"), str))),
)
_PARAMETERS = _Kind(
    "a mapping of texts, numbers and lists of them",
    _mapping_of(lambda value: _scalar(value) or _list_of(_scalar)(value)),
)
_SIZE_KEYS = {"nodes": _COUNT, "tasks_per_node": _COUNT}
_SERVER_KEYS = {"run": _TEXT, "port": _COUNT, "inputs": _TEXTS, **_SIZE_KEYS}
_STAGE_KEYS = {
    **{"name": _TEXT, "about": _TEXT, "run": _TEXTS, "servers": _TEXTS, "inputs": _TEXTS, "outputs": _TEXTS},
    **{"in_sight": _FLAG, **_SIZE_KEYS},
}
_STEPS_KEYS = {"parameters": _PARAMETERS, "servers": _MAPPINGS, "stages": _MAPPINGS}
_FLOW_KEYS = {"use": _TEXT, **_STEPS_KEYS, "stages": _STAGES}

Command = tuple[str, ...]  # a script and its arguments


@dataclass(frozen=True)
class Server:
    """A command that answers GET /health on its port, `{NAME.port}` in commands, while a stage runs."""

    name: str
    command: Command
    port: int  # where it listens if the command is typed; a run takes a free one
    size: Size = ONE_TASK


@dataclass(frozen=True)
class Stage:
    """Commands, run one after the other while the servers run.

    `folder` belongs to this stage alone; outputs lie in it. A stage in sight has the terminal, runs every time,
    gets `--stages_file`, a JSON file of all stages' seconds, and gives its exit code to the flow.
    """

    name: str
    folder: Path
    commands: tuple[Command, ...]
    inputs: tuple[Path, ...]  # files, or folders with all their files
    outputs: tuple[Path, ...]
    servers: tuple[Server, ...] = ()
    size: Size = ONE_TASK
    about: str = ""
    in_sight: bool = False


@dataclass(frozen=True)
class Flow:
    name: str
    folder: Path
    stages: tuple[Stage, ...]
    parameters: Mapping[str, Any]  # as the file and the command line give them

    def choose(self, only: str | None = None, start: str | None = None) -> tuple[Stage, ...]:
        """One stage, or those from `start` on. Raises InputError if the flow has no such stage."""
        names = [stage.name for stage in self.stages]
        for name in filter(None, (only, start)):
            if name not in names:
                raise InputError(f"flow {self.name} has no stage {name}; its stages are {', '.join(names)}")
        if only is not None:
            return (self.stages[names.index(only)],)
        return self.stages[names.index(start) if start is not None else 0 :]

    def require_inputs(self, stages: Sequence[Stage]) -> None:
        """Raise InputError, naming the first, if a file is missing that none of these stages will make."""
        for number, stage in enumerate(stages):
            for path in stage.inputs:
                if path.exists() or _maker(stages[:number], path) is not None:
                    continue
                maker = _maker(self.stages, path)
                hint = f", which stage {maker.name} makes" if maker is not None else ""
                raise InputError(f"{path}: no such file; stage {stage.name} needs it{hint}")


def load_flow(path: str | Path, settings: Sequence[str] = ()) -> Flow:
    """Read a flow with `KEY=VALUE` settings of its parameters; a list is given as one text, split as a shell does.

    Raises:
        InputError: no such file.
        ConfigError: every problem of the file and the settings.
    """
    path = require_file(path)
    problems: list[str] = []
    given = _yaml(path, _FLOW_KEYS, problems)
    steps = _yaml(require_file(path.parent / given["use"]), _STEPS_KEYS, problems) if "use" in given else {}
    parameters = {**steps.get("parameters", {}), **given.get("parameters", {})}
    parameters |= _settings(settings, parameters, problems)
    stated = _stated(given.get("stages", []), steps.get("stages", {}), problems)
    servers = {
        name: _checked(server, _SERVER_KEYS, f"server {name}", problems)
        for name, server in {**steps.get("servers", {}), **given.get("servers", {})}.items()
    }
    values = _Values(parameters, [stage["name"] for stage in stated], problems)
    out = Path(values.text("{out}", "parameter out"))
    stages = tuple(_stage(stage, servers, values, out) for stage in stated)
    problems += _undeclared(stages)
    if problems:
        raise ConfigError(_listed(path, list(dict.fromkeys(problems))))
    return Flow(path.stem, out, stages, parameters)


class _Values:
    """Fills `{name}` in: a parameter, perhaps by others, or the folder of a stage."""

    def __init__(self, parameters: Mapping[str, Any], stages: Sequence[str], problems: list[str]) -> None:
        self._parameters = {**dict.fromkeys(stages, ""), **parameters}
        self._stages = set(stages)
        self.problems = problems
        for name in sorted(self._stages & set(parameters)):
            problems.append(f"{name} is a stage and a parameter; give one of them another name")

    def text(self, template: object, where: str, above: tuple[str, ...] = ()) -> str:
        return _NAME.sub(lambda match: self._value(match[1], where, above), str(template))

    def words(self, command: str, where: str) -> Command:
        """A command's words. One that is nothing but a parameter with a list becomes as many words."""
        words: list[str] = []
        for word in _split(command, where, self.problems):
            named = _NAME.fullmatch(word)
            value = self._parameters.get(named[1]) if named else None
            words += [self.text(part, where) for part in (value if isinstance(value, list) else [word])]
        return tuple(words)

    def count(self, template: object, where: str) -> int:
        text = self.text(template, where)
        if text.isdecimal() and int(text) > 0:
            return int(text)
        self.problems.append(f"{where} is {text!r}; a number above 0 is needed")
        return 1

    def _value(self, name: str, where: str, above: tuple[str, ...]) -> str:
        value = self._parameters.get(name)
        if name in self._stages:
            return str(Path(self.text("{out}", where, above)) / name)
        if name not in self._parameters:
            self.problems.append(f"{where}: {{{name}}} is no parameter and no stage{_nearest(name, self._parameters)}")
        elif name in above:
            self.problems.append(f"parameter {name} is given by itself: {' -> '.join([*above, name])}")
        elif value == REQUIRED:
            self.problems.append(f"parameter {name} has no value; add {name}=... to the command")
        elif isinstance(value, list):
            self.problems.append(f"{where}: {{{name}}} is a list; it can only stand as a word of its own")
        else:
            return self.text(value, where, (*above, name))
        return f"{{{name}}}"


def _yaml(path: Path, known: Mapping[str, _Kind], problems: list[str]) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as err:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(err).split())}") from err
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a mapping with {', '.join(known)} is needed")
    return _checked(content, known, path.name, problems)


def _checked(given: Mapping[str, Any], known: Mapping[str, _Kind], where: str, problems: list[str]) -> dict[str, Any]:
    """What is known and of its kind; of the rest, the problems are noted."""
    for key, value in given.items():
        if key not in known:
            problems.append(f"{where}: unknown key {key}{_nearest(str(key), known)}")
        elif not known[key].fits(value):
            problems.append(f"{where}: {key} is {value!r}; {known[key].what} is needed")
    return {key: value for key, value in given.items() if key in known and known[key].fits(value)}


def _settings(settings: Sequence[str], parameters: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            problems.append(f"{setting!r} is no setting; parameters are given as KEY=VALUE")
        elif key not in parameters:
            problems.append(f"unknown parameter {key}{_nearest(key, parameters)}")
        else:
            given[key] = _split(value, f"parameter {key}", problems) if isinstance(parameters[key], list) else value
    return given


def _split(text: str, where: str, problems: list[str]) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as err:
        problems.append(f"{where} is {text!r}, which a shell cannot split: {err}")
        return []


def _stated(stages: Sequence[Any], known: Mapping[str, Any], problems: list[str]) -> list[dict[str, Any]]:
    """The flow's stages as they are written; one that is only named is of the file it uses."""
    written: list[dict[str, Any]] = []
    for stage in stages:
        if isinstance(stage, dict):
            written.append(stage)
        elif stage in known:
            written.append({**known[stage], "name": stage})
        else:
            problems.append(f"stage {stage!r} is stated nowhere{_nearest(stage, known)}")
    names = [stage["name"] for stage in written]
    problems += [f"stage {name} is there twice" for name in sorted({name for name in names if names.count(name) > 1})]
    return [_checked(stage, _STAGE_KEYS, f"stage {stage['name']}", problems) for stage in written]


def _stage(stage: Mapping[str, Any], servers: Mapping[str, Any], values: _Values, out: Path) -> Stage:
    name = f"stage {stage['name']}"
    used = [key for key in stage.get("servers", []) if key in servers]
    for key in stage.get("servers", []):
        if key not in servers:
            values.problems.append(f"{name}: no server {key}{_nearest(key, servers)}")
    commands = tuple(_command(line, used, values, name) for line in stage.get("run", []))
    if not commands:
        values.problems.append(f"{name} has nothing to run")
    inputs = [path for key in used for path in servers[key].get("inputs", [])] + list(stage.get("inputs", []))
    folder = out / stage["name"]
    if not _NAME.fullmatch(f"{{{stage['name']}}}"):
        values.problems.append(f"{name}: letters, digits, - and _ make a name; it is the name of a folder, too")
    outputs = tuple(folder / values.text(path, name) for path in stage.get("outputs", []))
    for path in outputs:
        if folder not in path.parents or ".." in path.relative_to(folder).parts:
            values.problems.append(f"{name}: the output {path} is not in the stage's folder")
    return Stage(
        stage["name"],
        folder,
        commands,
        tuple(dict.fromkeys(Path(values.text(path, name)) for path in inputs)),
        outputs,
        tuple(_server(key, servers[key], values) for key in used),
        _size(stage, values, name),
        " ".join(stage.get("about", "").split()),
        stage.get("in_sight", False),
    )


def _server(key: str, server: Mapping[str, Any], values: _Values) -> Server:
    name = f"server {key}"
    command = _command(server.get("run", ""), [key], values, name)
    return Server(key, command, values.count(server.get("port", ""), f"{name}: port"), _size(server, values, name))


def _size(given: Mapping[str, Any], values: _Values, where: str) -> Size:
    return Size(*(values.count(given.get(key, 1), f"{where}: {key}") for key in ("nodes", "tasks_per_node")))


def _command(line: str, servers: Sequence[str], values: _Values, where: str) -> Command:
    words = values.words(line, where)
    if not words or not (SCRIPTS / words[0]).is_file():
        values.problems.append(f"{where}: a command starts with a script of {SCRIPTS}, not with {words[:1]}")
    for name in _PORT.findall(line):
        if name not in servers:
            values.problems.append(f"{where}: {{{name}.port}} is the port of a server that does not run here")
    return words


def _undeclared(stages: Sequence[Stage]) -> Iterator[str]:
    """What a command is told to read must be an input, or a change of it would go unnoticed."""
    for number, stage in enumerate(stages):
        for path in stage.inputs:
            later = _maker(stages[number:], path)
            if later is not None and _maker(stages[:number], path) is None:
                yield f"stage {stage.name} reads {path}, which stage {later.name} makes after it"
        before = {path for earlier in stages[:number] for path in earlier.outputs}
        commands = [*stage.commands, *(server.command for server in stage.servers)]
        for path in before & {Path(word.partition("=")[2] or word) for command in commands for word in command[1:]}:
            if not any(path == known or known in path.parents for known in stage.inputs):
                yield f"stage {stage.name} is told to read {path}, but it is not among its inputs"


def _maker(stages: Sequence[Stage], path: Path) -> Stage | None:
    """The stage that has this file, or one in this folder, among its outputs."""
    return next((s for s in stages for output in s.outputs if output == path or path in output.parents), None)


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _listed(path: Path, problems: Sequence[str]) -> str:
    return f"{path}: {problems[0]}" if len(problems) == 1 else "\n  ".join([f"{path}:", *problems])
