"""The table of training methods. A new one is a row here and a file beside this one."""

from __future__ import annotations

from steerlm_nemo.training.method import Method
from steerlm_nemo.training.methods.sft import SFT

METHODS: dict[str, Method] = {method.name: method for method in (SFT,)}
