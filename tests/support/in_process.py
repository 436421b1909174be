"""Scripts run inside this process: a process for each would take a second of imports."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"


class Ended(NamedTuple):
    code: object  # 0, or what it exited with
    out: str
    err: str

    @property
    def said(self) -> str:
        return self.out + self.err


def run_script(script: str, *arguments: object) -> Ended:
    """A script of scripts/ as its users run it. An exception that it does not turn into a message goes through."""
    out, err = io.StringIO(), io.StringIO()
    limit, code = sys.getrecursionlimit(), 0
    with (
        mock.patch.object(sys, "argv", [script, *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            sys.setrecursionlimit(limit)
    return Ended(code, out.getvalue(), err.getvalue())
