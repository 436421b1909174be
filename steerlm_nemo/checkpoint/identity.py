"""Telling one model from another: what a `.nemo` is called, and a digest of what it holds, however it is packed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

from steerlm_nemo.checkpoint.archive import NemoFile
from steerlm_nemo.model_kind import PROVENANCE_KEY

_WHOLE_BYTES = 2**20
_NUM_BLOCKS, _BLOCK_BYTES = 256, 4096


def name_of(nemo: NemoFile) -> str:
    """The name of the run that made the model, where one did; otherwise the file's, without its ending."""
    provenance = nemo.config.get(PROVENANCE_KEY)
    stored = provenance.get("name") if isinstance(provenance, Mapping) else None
    return stored if isinstance(stored, str) and stored else nemo.path.resolve().stem


def identity(nemo: NemoFile) -> str:
    """16 hex digits over config, tokenizer and weights; equal for a packed, gzipped and unpacked `.nemo`.

    Members above 1 MiB go in as 256 blocks of 4 KiB spread over them, so that a model of any size takes well under a
    second. Training changes every tensor; a file changed by hand between the blocks is for `inspect_nemo.py --verify`.
    """
    digest = hashlib.sha256()
    for name, num_bytes in sorted(nemo.members.items()):
        digest.update(f"{name}\0{num_bytes}\0".encode())
        with nemo.open(name) as file:
            if num_bytes <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            for block in range(_NUM_BLOCKS):
                file.seek((num_bytes - _BLOCK_BYTES) * block // (_NUM_BLOCKS - 1), os.SEEK_SET)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]
