"""Refuse an image whose environment is not the one that was tested; the last step of every build.

    python containers/check_image.py

A base image brings its own NeMo, Megatron and Aligner, sometimes as source trees on PYTHONPATH: these would win over
the packages installed on top, and nobody would notice.
"""

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from steerlm_nemo.compat.capabilities import PINS

MODULES = {"nemo_toolkit": "nemo", "megatron-core": "megatron.core", "nemo-aligner": "nemo_aligner"}


def problems() -> Iterator[str]:
    for distribution, pin in PINS.items():
        version = version_of(distribution)
        if version != pin:
            yield f"{distribution} is {version}, tested is {pin}; install {distribution}=={pin} with --no-deps"
        elif not (origin := module_file(MODULES[distribution])).is_relative_to(site_packages(distribution)):
            yield f"{MODULES[distribution]} is imported from {origin}, not from {distribution} {pin}; clear PYTHONPATH"
    for text in importlib.metadata.requires("steerlm-nemo") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = version_of(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} is {version}, needed is {requirement}"
    if version_of("apex") is not None and importlib.util.find_spec("amp_C") is None:
        yield "apex without its CUDA extension amp_C: probably the unrelated package of that name; pip uninstall apex"


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def module_file(module: str) -> Path:
    spec = importlib.util.find_spec(module)
    return Path(spec.origin if spec is not None and spec.origin else "nowhere").resolve()


def site_packages(distribution: str) -> Path:
    return Path(str(importlib.metadata.distribution(distribution).locate_file(""))).resolve()


def main() -> None:
    found = list(problems())
    for problem in found:
        print(f"error: {problem}", file=sys.stderr)
    if found:
        sys.exit(1)
    print("this environment is the tested one: " + ", ".join(f"{name} {pin}" for name, pin in PINS.items()))


if __name__ == "__main__":
    main()
