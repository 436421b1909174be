"""The flags of the scripts: one spelling for all of them."""

from __future__ import annotations

import argparse
from typing import Any


class Flags(argparse.ArgumentParser):
    """A parser whose flags are known as `--a_b` and as `--a-b`, never by their beginning: a later one may share it."""

    def __init__(self, description: str | None, **options: Any) -> None:
        options = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, **options}
        super().__init__(description=description, **options)

    def flag(self, name: str, *aliases: str, **options: Any) -> None:
        """Add `--name` and its aliases, all with underscores; `options` are those of `add_argument`."""
        spellings = [s for known in (name, *aliases) for s in (f"--{known}", f"--{known.replace('_', '-')}")]
        self.add_argument(*dict.fromkeys(spellings), **{"dest": name, **options})
