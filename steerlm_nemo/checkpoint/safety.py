"""What a checkpoint may contain, checked before NeMo, Megatron or torch reads any of it.

Loading a `.nemo` runs code in three places: pickles (`common.pt`, `.metadata`, `*.ckpt`, the byte objects inside
`*.distcp`), class paths in `model_config.yaml` that NeMo imports and calls, and YAML object tags. Each check here
reads the same bytes without building anything they name (pickles.py).

What a check refuses is a `CheckpointError`; a damaged file that cannot be parsed is one too.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from steerlm_nemo.checkpoint.pickles import load_torch_file
from steerlm_nemo.checkpoint.torch_dist import check_index
from steerlm_nemo.errors import CheckpointError

CONFIG_NAME = "model_config.yaml"
MAX_CONFIG_BYTES = 4 * 2**20
MAX_CONFIG_NODES = 200_000  # a genuine config has a few hundred; a YAML alias bomb has billions

# Narrower than the whole of torch or nemo: torch.hub.load and torch.load live there too. The nemo, torch and
# lightning prefixes are those of NeMo 2.3.2's own `safe_instantiate`.
TARGET_PREFIXES = (
    *("nemo.collections.", "nemo.core.", "nemo.lightning.", "nemo_aligner.", "megatron.core."),
    *("torch.nn.", "torch.optim.", "torch.utils.data.", "lightning.pytorch.", "pytorch_lightning."),
)  # fmt: skip
_TARGET_KEYS = ("_target_", "target", "cls")
# NeMo's tokenizer libraries but for `tabular`, which unpickles its vocabulary.
TOKENIZER_LIBRARIES = ("sentencepiece", "huggingface", "megatron", "byte-level", "regex", "tiktoken", "null")

_PICKLE_SUFFIXES = (".pt", ".pth", ".ckpt")
_INDEX_SUFFIX = ".metadata"  # torch also knows one per rank, such as `__0.metadata`
ZARR_ARRAY = ".zarray"


class ConfigLoader(yaml.SafeLoader):
    """YAML without object tags, reading `1e-05` as a number, as OmegaConf does and plain PyYAML does not."""


ConfigLoader.add_implicit_resolver(  # type: ignore[no-untyped-call]
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


_RESOLVER = re.compile(r"\$\{[^{}]*:")  # `${name:...}` calls; `${name}` only refers to another key


def parse_config(data: bytes, where: str) -> dict[str, Any]:
    """`model_config.yaml` as a dict, checked.

    Raises:
        CheckpointError: not YAML, an object tag, a class path outside `TARGET_PREFIXES`, or no mapping.
    """
    if len(data) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{where}: {len(data)} bytes; a model config has at most {MAX_CONFIG_BYTES}. Refused.")
    try:
        config = yaml.load(data, Loader=ConfigLoader)
    except yaml.constructor.ConstructorError as err:
        raise CheckpointError(
            f"{where}: {err.problem}{err.problem_mark}: "
            "YAML object tags can run code. Refused; a model config needs none."
        ) from err
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as err:
        raise CheckpointError(f"{where}: not valid YAML: {err}") from err
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: a model config is a mapping, this is a {type(config).__name__}")
    check_config(config, where)
    return config


def check_config(config: Any, where: str) -> None:
    """Refuse class paths outside `TARGET_PREFIXES` and `trust_remote_code` anywhere in a parsed config."""
    num_nodes = 0
    for num_nodes, (path, key, value) in enumerate(_entries(config, ""), start=1):
        if num_nodes > MAX_CONFIG_NODES:
            raise CheckpointError(
                f"{where}: more than {MAX_CONFIG_NODES} values once its aliases are expanded. Refused."
            )
        if key == "trust_remote_code" and value:
            raise CheckpointError(
                f"{where}: {path} is {value!r}: that lets a tokenizer run Python code of its own. Set it to false."
            )
        if key == "library" and isinstance(value, str) and value not in TOKENIZER_LIBRARIES:
            raise CheckpointError(
                f"{where}: {path} is {value!r}, a tokenizer that is not known to be safe to load. "
                f"Known are {', '.join(TOKENIZER_LIBRARIES)}."
            )
        if isinstance(value, str) and _RESOLVER.search(value):
            raise CheckpointError(
                f"{where}: {path} is {value!r}: OmegaConf would call a function of that name, which can read the "
                "environment. Refused; a checkpoint's config holds values only."
            )
        if isinstance(value, str) and value.startswith("nemo:") and _leaves(value.removeprefix("nemo:")):
            raise CheckpointError(f"{where}: {path} is {value!r}, which leads out of the archive. Refused.")
        # `target` and `cls` are also ordinary words; only a dotted path is imported.
        is_class_path = key == "_target_" or (key in _TARGET_KEYS and isinstance(value, str) and "." in value)
        if is_class_path and not (isinstance(value, str) and value.startswith(TARGET_PREFIXES)):
            raise CheckpointError(
                f"{where}: {path} is {value!r}, which loading would import and call. "
                f"Only {', '.join(prefix + '*' for prefix in TARGET_PREFIXES)} are allowed."
            )


def _leaves(member: str) -> bool:
    return member.startswith("/") or ".." in member.split("/")


def _entries(node: Any, path: str, depth: int = 0) -> Iterator[tuple[str, Any, Any]]:
    if depth > 50:
        raise CheckpointError(f"{path[:80]}...: nested more than 50 levels deep. Refused.")
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        below = f"{path}.{key}" if path else str(key)
        yield below, key, value
        yield from _entries(value, below, depth + 1)


def is_pickle_file(name: str) -> bool:
    """Whether NeMo, Megatron or torch would unpickle a member of this name as a whole."""
    return name.endswith(_PICKLE_SUFFIXES)


def is_index(name: str) -> bool:
    """Whether torch would read a member of this name as the index of a distributed checkpoint."""
    return name.endswith(_INDEX_SUFFIX)


def zarr_array(data: bytes, where: str) -> dict[str, Any]:
    """The content of a `.zarray`, as Megatron writes it: bare numbers, neither compressed nor filtered.

    Raises:
        CheckpointError: anything else. A filter can be a pickle, and a compressor is code that reads foreign bytes.
    """
    try:
        array = json.loads(data)
        is_plain = array["compressor"] is None and not array["filters"] and array["order"] == "C"
        is_number = re.fullmatch(r"[<|][fiub][1248]|bfloat16", array["dtype"]) is not None
    except (ValueError, KeyError, TypeError, RecursionError) as err:
        raise CheckpointError(f"{where}: not the description of a zarr array ({err!r})") from err
    if not is_plain or not is_number:
        raise CheckpointError(
            f"{where}: only uncompressed arrays of numbers, as Megatron writes them, are read. Refused."
        )
    return array


def check_directory(directory: Path) -> None:
    """Check config and every pickle of an extracted `.nemo` or of a training checkpoint; refuse links in it.

    Raises:
        CheckpointError: naming the first file that is refused.
    """
    for root, folders, files in os.walk(directory):
        for name in sorted([*folders, *files]):
            path = Path(root, name)
            if path.is_symlink():
                raise CheckpointError(
                    f"{path}: a link inside a checkpoint. Refused; replace it by the file it points to."
                )
            if name not in folders and not path.is_file():
                raise CheckpointError(f"{path}: neither a file nor a directory. Refused.")
        for name in sorted(files):
            path = Path(root, name)
            if name == CONFIG_NAME:
                parse_config(path.read_bytes(), str(path))
            elif name == ZARR_ARRAY:
                zarr_array(path.read_bytes(), str(path))
            elif is_pickle_file(name):
                with path.open("rb") as file:
                    load_torch_file(file, str(path))
            elif is_index(name):
                check_index(path)
