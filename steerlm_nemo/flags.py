"""The flags of the scripts: one spelling for all of them."""

from __future__ import annotations

import argparse
import difflib
import sys
from typing import Any


class Flags(argparse.ArgumentParser):
    """A parser whose flags are known as `--a_b` and as `--a-b`, never by their beginning: a later one may share it."""

    def __init__(self, description: str | None, **options: Any) -> None:
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options}
        super().__init__(description=description, **options)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse, but a misspelt flag is named before those that are missing for it."""
        for argument in sys.argv[1:] if args is None else args:
            if argument == "--":  # what follows are no flags
                break
            name = str(argument).partition("=")[0]
            if name.startswith("--") and len(name) > 2 and name not in self._option_string_actions:
                near = difflib.get_close_matches(name, self._option_string_actions, n=1)
                self.error(f"unrecognized arguments: {argument}" + (f"; did you mean {near[0]}?" if near else ""))
        return super().parse_known_args(args, namespace)

    def flag(self, name: str, *aliases: str, **options: Any) -> None:
        """Add `--name` and its aliases, all with underscores; `options` are those of `add_argument`."""
        spellings = [s for known in (name, *aliases) for s in (f"--{known}", f"--{known.replace('_', '-')}")]
        self.add_argument(*dict.fromkeys(spellings), **{"dest": name, **options})
