"""The template of a model, from whatever names it."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from steerlm_nemo.checkpoint.archive import read_config
from steerlm_nemo.errors import ConfigError, InputError
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.records import read_whole
from steerlm_nemo.template import ChatTemplate


def template_from(path: str | Path) -> ChatTemplate:
    """The template a model was or will be trained with.

    Args:
        path: a `.nemo` file or folder, or a `model_config.yaml` or training YAML; read are its `steerlm` key and
            `[model.]data.chat_prompt_tokens`.

    Raises:
        InputError: no such file, or not YAML.
        CheckpointError: not a `.nemo`, or an unsafe one.
        ConfigError, FormatMismatchError: the configuration names no markers, or unusable ones.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        try:
            config = yaml.safe_load(read_whole(path))
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as err:
            raise InputError(f"{path}: not plain YAML: {err}") from err
        if not isinstance(config, dict):
            raise InputError(f"{path}: a configuration with keys is needed, found {type(config).__name__}")
    else:
        config = read_config(path)
    if config.get(SteerLMFormat.CONFIG_KEY):
        return SteerLMFormat.from_dict(config[SteerLMFormat.CONFIG_KEY]).template
    model = config.get("model", config)
    data = model.get("data") if isinstance(model, dict) else None
    tokens = data.get("chat_prompt_tokens") if isinstance(data, dict) else None
    if not isinstance(tokens, dict):
        raise ConfigError(f"{path}: names no markers (data.chat_prompt_tokens); give them as flags: --turn_start ...")
    return ChatTemplate.from_config(tokens, warn=_warn)


def _warn(message: str) -> None:
    print(message, file=sys.stderr)
