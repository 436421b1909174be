"""Configs of nemo_configs/ with Hydra's override grammar: `key=value`, `+key=value`, `++key=value`.

Options: `--config-name=NAME`, `--config-path=DIR`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from omegaconf import DictConfig, OmegaConf

from steerlm_nemo.accepted_keys import ACCEPTED
from steerlm_nemo.errors import ConfigError, listed

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

CONFIG_DIR = Path(__file__).resolve().parents[1] / "nemo_configs"


def load_config(argv: Sequence[str], default_name: str) -> DictConfig:
    """Compose a config of nemo_configs/ with the overrides of the command line.

    Raises:
        ConfigError: no such config, YAML or an override that does not parse, an unknown key (the nearest is named), or
            a value that would silently have no effect.
    """
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException

    name, directory, overrides = default_name, CONFIG_DIR, []
    for arg in argv:
        key, _, value = arg.partition("=")
        if key in ("--config-name", "-cn"):
            name = value.removesuffix(".yaml")
        elif key in ("--config-path", "-cp"):
            directory = Path(value).resolve()
        elif arg.startswith("--"):
            raise ConfigError(f"unknown option {arg}; settings are written key=value, for example trainer.devices=2")
        else:
            overrides.append(arg)
    if not (directory / f"{name}.yaml").is_file():
        known = listed(sorted(path.stem for path in directory.glob("*.yaml") if path.is_file()))
        raise ConfigError(f"no config {name!r} in {directory}; there are: {known or 'none'}")
    if not OmegaConf.has_resolver("multiply"):
        OmegaConf.register_new_resolver("multiply", lambda a, b: a * b)
    parsed = [_parse(override) for override in overrides]
    try:
        with initialize_config_dir(version_base=None, config_dir=str(directory)):
            # A user's own YAML elsewhere may build on ours: `defaults: [gpt_sft, _self_]`.
            ours = [f"hydra.searchpath=[file://{CONFIG_DIR}]"]
            cfg = compose(config_name=name, overrides=[*ours, *overrides])
    except HydraException as err:
        raise ConfigError(_explain(err, directory / f"{name}.yaml")) from err
    except yaml.YAMLError as err:
        raise ConfigError(f"config {name} of {directory} is not valid YAML: {' '.join(str(err).split())}") from err
    except (OSError, UnicodeDecodeError, RecursionError) as err:  # Hydra and OmegaConf let them through
        raise ConfigError(f"{directory / name}.yaml: cannot be read as a config: {err}") from err
    added = tuple(override.key_or_group for override in parsed if override.is_add() or override.is_force_add())
    _refuse_unknown_keys(cfg, directory / f"{name}.yaml", default_name, added)
    _refuse_without_effect(cfg, default_name)
    return cfg


def _parse(override: str) -> Override:
    """One override in Hydra's grammar. Raises ConfigError naming the one that is not."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as err:
        how = "quote its value" if "=" in override else "settings are written key=value; a value with blanks is quoted"
        raise ConfigError(
            f"cannot parse the override {override!r}: {how}, for example \"key='<extra_id_0>'\". "
            f"({' '.join(str(err).split())})"
        ) from err
    if parsed.is_sweep_override():
        key, _, value = override.partition("=")
        raise ConfigError(
            f"{override!r} gives {key} several values: quote it, \"{key}='{value}'\", or write a list, [...]"
        )
    return parsed


def _refuse_unknown_keys(cfg: DictConfig, path: Path, default_name: str, added: tuple[str, ...]) -> None:
    """Hydra checks the keys of overrides only: a key misspelt inside a YAML file would just have no effect."""
    known = set(all_keys(CONFIG_DIR / f"{default_name}.yaml"))
    defaults = _compose(CONFIG_DIR / f"{default_name}.yaml")
    for key in _flatten(cfg, ""):
        is_added = any(f"{key}.".startswith(f"{a}.") or a.startswith(f"{key}.") for a in added)
        if key not in known and not is_added:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"{path}: unknown config key {key}{hint}")
        if key in known:
            _refuse_wrong_type(key, _raw(cfg, key), _raw(defaults, key))


def _refuse_without_effect(cfg: DictConfig, default_name: str) -> None:
    """Values that the reference has a use for and this project has none."""
    problems = []
    for key, accepted in ACCEPTED.get(default_name, {}).items():
        value = OmegaConf.select(cfg, key, default=None)
        if accepted.values is not None and value not in accepted.values:
            left = " or ".join("null" if value is None else str(value) for value in accepted.values)
            problems.append(f"{key} is {value!r}, which would have no effect: {accepted.why}. Leave it at {left}")
    if problems:
        raise ConfigError("\n".join(problems))


def _raw(cfg: DictConfig, key: str) -> object:
    """A value as it is written: no interpolation is resolved and nothing is missing."""
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    found = node._get_node(name) if isinstance(node, DictConfig) else None
    return getattr(found, "_value", lambda: None)() if found is not None else None


def _refuse_wrong_type(key: str, value: object, default: object) -> None:
    """A text where the default is a number or a switch, or a value in place of a section, would fail much later."""
    if isinstance(default, dict) and not (value is None or isinstance(value, dict)):
        raise ConfigError(f"{key} is {value!r}; it is a section, with {', '.join(map(str, default))}")
    if (
        isinstance(value, str)
        and not value.startswith("$")
        and value != "???"
        and isinstance(default, (bool, int, float))
    ):
        kind = "true or false" if isinstance(default, bool) else "a number"
        raise ConfigError(f"{key} is {value!r}; it must be {kind}")


def _explain(err: Exception, path: Path) -> str:
    text = " ".join(str(err).split())
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1].lstrip("+")
        near = difflib.get_close_matches(key, all_keys(path), n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]}?" if near else "."
        return f"unknown config key {key}{hint} To add a key on purpose, write +{key}=..."
    return f"{path}: {text}"


def _compose(path: Path) -> DictConfig:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(version_base=None, config_dir=str(path.parent)):
        return compose(config_name=path.stem)


def all_keys(path: Path) -> list[str]:
    """Every key of a config file, sections and values."""
    return list(_flatten(_compose(path), ""))


def _flatten(cfg: DictConfig, prefix: str) -> Iterator[str]:
    for key in map(str, cfg):
        full = f"{prefix}{key}"
        yield full
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none() and not node._is_missing():
            yield from _flatten(node, f"{full}.")


def printable(cfg: DictConfig) -> str:
    """The resolved config as YAML."""
    return OmegaConf.to_yaml(cfg, resolve=True)
