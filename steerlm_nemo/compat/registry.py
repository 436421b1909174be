"""Adaptations of the pinned stack: a table of what is replaced, why, and when the replacement can go.

An adaptation names an upstream symbol. If that symbol is gone, applying it fails loudly: a patch that patches
nothing would let a run continue with behaviour nobody tested.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from steerlm_nemo.errors import SteerLMError


class CompatError(SteerLMError):
    """The installed stack is not the one these adaptations were written for."""


@dataclass(frozen=True)
class Adaptation:
    """One replacement. `symbol` is `module:attribute.path`; `until` says when it can be removed."""

    symbol: str
    reason: str
    until: str
    make: Callable[[Any], Any]  # original -> replacement
    may_be_missing: bool = False  # upstream defines it only together with Apex

    def apply(self) -> None:
        """Put the replacement in place. Raises CompatError if the symbol is gone."""
        module_name, _, path = self.symbol.partition(":")
        try:
            owner: Any = importlib.import_module(module_name)
            *parents, name = path.split(".")
            for parent in parents:
                owner = getattr(owner, parent)
            original = getattr(owner, name, None) if self.may_be_missing else getattr(owner, name)
        except (ImportError, AttributeError) as err:
            raise CompatError(
                f"{self.symbol} is not there ({err}), but running without CUDA needs to adapt it ({self.reason}). "
                "Install the pinned versions: pip install 'steerlm-nemo[cpu]'."
            ) from err
        setattr(owner, name, self.make(original))
