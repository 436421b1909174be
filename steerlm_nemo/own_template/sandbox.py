"""The process in which a model's own chat template runs; `renderer` starts it as a script and speaks with it.

A template is a program written by whoever made the model. Jinja's immutable sandbox keeps it to the values it is given,
but not from using up time and memory (`range(99999)` in `range(99999)`, `'a' * 10**10`), and a sandbox may have holes.
So it runs in a process that opens no file, has no environment to speak of, and is ended by its limits.

One line of JSON in, one out. First the template: {"source", "megabytes", "seconds"} -> {} or {"failed"}; then, as often
as asked, {"variables", "most"} -> {"text"}, or {"refused"} by the template itself, {"failed"} or {"longer"} than `most`
characters. Nothing but Jinja is imported here, so that it starts at once.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Environment, Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Python and Jinja read some of their own files when they are first needed: codecs, the time zone, what shows errors.
_WARM_UP = r"""{{ "\u00e4\n" }}{{ to.it | default("ä") | tojson }}{{ strftime_now("%Z") }}"""
_LONGEST_WORDS = 1000  # characters of a template's own error that are passed on


class _RefusedError(TemplateError):
    """What `raise_exception` of a template raises."""


class _Generation(Extension):
    """`{% generation %}`, with which training marks what an assistant says: its content is rendered, and that is all.

    A call block, as in transformers: what is set inside is not seen outside.
    """

    tags = {"generation"}  # noqa: RUF012 - as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Callable[[], str]) -> str:
        return caller()


def environment() -> Environment:
    """As transformers has it (`_compile_jinja_template`)."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


def _tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, **keys: Any) -> str:
    """Jinja's own escapes what HTML must not have."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, **keys)


def _raise_exception(message: object) -> NoReturn:
    raise _RefusedError(str(message))


def render(template: Template, variables: Mapping[str, Any], most: int) -> dict[str, Any]:
    """The answer to one request."""
    parts, length = [], 0
    try:
        for part in template.generate(**variables):
            parts.append(part)
            length += len(part)
            if length > most:
                return {"longer": True}
        text = "".join(parts)
        text.encode()  # lone surrogates, which no tokenizer takes
    except _RefusedError as err:
        return {"refused": str(err.message)[:_LONGEST_WORDS]}
    except MemoryError:
        return {"failed": "it needs more memory than it may have"}
    except RecursionError:
        return {"failed": "it calls itself without end"}
    except Exception as err:  # whatever the template does with what it was given
        return {"failed": f"{type(err).__name__}: {err}"[:_LONGEST_WORDS]}
    return {"text": text}


def _compiled(source: str) -> tuple[Template | None, dict[str, Any]]:
    try:
        return environment().from_string(source), {}
    except TemplateSyntaxError as err:
        return None, {"failed": f"line {err.lineno}: {err.message}"[:_LONGEST_WORDS]}
    except Exception as err:  # constants are computed while compiling: OverflowError, MemoryError, RecursionError
        return None, {"failed": f"{type(err).__name__}: {err}"[:_LONGEST_WORDS]}


def _limit_process(megabytes: int) -> None:
    """Of memory, what the process has and so much more; no core, and no file that is not open now."""
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    most = used + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def _limit_time(seconds: int) -> None:
    """The kernel ends the process when it has worked for so many seconds from now."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def main() -> None:
    """Until the other side closes the pipe."""
    template, _ = _compiled(_WARM_UP)
    assert template is not None and "text" in render(template, {"to": {}}, 100)
    assert "failed" in render(template, {}, 100)
    template, seconds = None, 0
    for line in sys.stdin:
        request = json.loads(line)
        if template is None:
            seconds = request["seconds"]
            _limit_process(request["megabytes"])
            _limit_time(seconds)
            template, answer = _compiled(request["source"])
        else:
            _limit_time(seconds)
            answer = render(template, request["variables"], request["most"])
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
