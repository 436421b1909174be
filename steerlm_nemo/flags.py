"""The flags of the scripts: one spelling for all of them."""

from __future__ import annotations

import argparse
import difflib
import functools
import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any

from steerlm_nemo.errors import InputError


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


def fire_as_typed(function: Callable[..., None]) -> None:
    """Run a function whose parameters are the flags, as NeMo's scripts do with fire; but a flag is the text typed.

    fire alone would read it as Python: `--output_file_prefix=2024_01_15` as 20240115. What a text becomes is said by
    the parameter's annotation: int, float, bool, tuple[str, ...] (`en,de`); anything else stays text.

    Raises:
        InputError: an unknown flag (the nearest is named), one without a value, or a value of another kind.
    """
    import fire

    signature = inspect.signature(function)
    parameters = [*signature.parameters.values()]
    by_place = [one for one in parameters if one.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD]
    by_name = [one for one in parameters if one.kind == inspect.Parameter.KEYWORD_ONLY]

    @functools.wraps(function)
    def run(*texts: str, **flags: str) -> None:
        if len(texts) > len(by_place):
            raise InputError(f"unexpected argument {texts[len(by_place)]!r}; see --help")
        if unknown := sorted(flags.keys() - signature.parameters.keys()):
            near = difflib.get_close_matches(unknown[0], signature.parameters, n=1)
            hint = f"did you mean --{near[0]}?" if near else "see --help"
            raise InputError(f"unknown flag --{unknown[0]}; {hint}")
        given = {**{one.name: text for one, text in zip(by_place, texts, strict=False)}, **flags}
        bare = _flags_without_value(sys.argv[1:])
        for name in given:
            if name in bare and signature.parameters[name].annotation is not bool:
                raise InputError(f"--{name} needs a value: --{name}=...")
        function(**{name: _value(name, text, signature.parameters[name].annotation) for name, text in given.items()})

    # With room for more than there is: fire would run first, and complain about a misspelt flag afterwards.
    run.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            *by_place,
            inspect.Parameter("unexpected", inspect.Parameter.VAR_POSITIONAL),
            *by_name,
            inspect.Parameter("unknown", inspect.Parameter.VAR_KEYWORD),
        ]
    )
    # Where a function takes any flag, fire shows its help only behind a separate `--`.
    ask_help = {"--help", "-h"} & {*sys.argv[1:]}
    fire.Fire(fire.decorators.SetParseFn(str)(run), command=["--", "--help"] if ask_help else None)


def _flags_without_value(arguments: Sequence[str]) -> set[str]:
    following = [*arguments[1:], "--"]
    return {
        one[2:].replace("-", "_") for one, after in zip(arguments, following, strict=True)
        if one.startswith("--") and "=" not in one and after.startswith("--")
    }  # fmt: skip


def _value(name: str, text: str, kind: Any) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise InputError(f"--{name} is {text!r}; it must be True or False, or stand alone")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError as err:
            raise InputError(f"--{name} is {text!r}; it must be a {'whole ' * (kind is int)}number") from err
    return tuple(item.strip() for item in text.split(",")) if kind == tuple[str, ...] else text
