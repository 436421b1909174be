"""What a path is that people give for a model and that is none here, with what to do about it.

Only names and first bytes are looked at.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

_LFS = b"version https://git-lfs.github.com/spec"
_HUB_PREFIXES = ("models--", "datasets--", "spaces--")
_START_BYTES = 64
_SAVE = "save it with save_pretrained"


def what_it_is(path: Path) -> str | None:
    """A few words on what lies at `path` and what to do, to stand behind its name; None where nothing is recognised."""
    try:
        if path.is_symlink() and not path.exists():
            return _broken(path)
        if path.is_dir():
            return next((text for look in _FOLDERS if (text := look(path)) is not None), None)
        if path.is_file():
            return by_content(path) or _by_name(path)
        if path.exists():
            return None
    except OSError:
        return None
    return _not_there(path)


def by_content(path: Path) -> str | None:
    """The same of a file, whatever its name. Raises OSError: it cannot be read."""
    with path.open("rb") as file:
        start = file.read(_START_BYTES)
    return next((text for begins, text in _FILES if start.startswith(begins)), None)


def _broken(path: Path) -> str:
    where = (
        "; it belongs to a download cache: copy the folder with cp -rL where it was downloaded, or download it again"
    )
    target = path.readlink()
    return f"a link to {target}, which is not there{where if 'blobs' in target.parts else '; copy the file itself'}"


def _not_there(path: Path) -> str:
    text = str(path)
    if text.count("/") == 1 and not text.startswith((".", "~", "/")):
        return (
            "no such file or folder. If this is a name of the Hugging Face Hub, download it first (nothing is fetched "
            f"here): hf download {text} --local-dir {path.name}"
        )
    return "no such file or folder"


_FILES = (
    (_LFS, "a pointer of git-lfs, not the file itself; run `git lfs pull` in that folder, or download it again"),
    (b"GGUF", f"a GGUF file. Load it with transformers (from_pretrained(folder, gguf_file=...)) and {_SAVE}"),
    (b"ggjt", "a GGML file, which nothing loads any more; look for the original checkpoint"),
    (b"<!DOCTYPE html", "a page of a web site, not the file itself; its download needs a login or another address"),
    (b"<html", "a page of a web site, not the file itself; its download needs a login or another address"),
    (b"\x7fELF", "a program"),
)


def _by_name(path: Path) -> str | None:
    if path.suffix == ".safetensors":
        return "a file of weights; give the folder that has it beside config.json and the tokenizer"
    if path.suffix == ".nemo":
        return "a .nemo file; scripts/inspect_nemo.py says what it holds, convert_nemo_to_hf_llama.py exports it"
    if path.suffix == ".pth":
        return _META
    if path.suffix in (".tar", ".gz", ".tgz", ".zip"):
        return "a packed folder; unpack it first"
    return None


_META = (
    "weights as Meta packs them (consolidated.*.pth). Take the Hugging Face folder of the same model, or run "
    "transformers' convert_llama_weights_to_hf.py"
)


def _empty(folder: Path) -> str | None:
    return "an empty folder" if not any(folder.iterdir()) else None


def _links(folder: Path) -> str | None:
    broken = sorted(entry for entry in folder.iterdir() if entry.is_symlink() and not entry.exists())
    return f"{broken[0].name} in it is {_broken(broken[0])}" if broken else None


def _hub_cache(folder: Path) -> str | None:
    """`models--owner--name` with its snapshots, that folder of snapshots, or the cache that has it."""
    parts = sorted(entry for entry in folder.iterdir() if entry.is_dir())
    if models := [entry for entry in parts if entry.name.startswith("models--")]:
        return f"a download cache; give the model's folder in it: {_snapshot_of(models[0]) or models[0]}"
    root = folder.parent if folder.name == "snapshots" else folder
    if (root / "snapshots").is_dir() and (root.name.startswith(_HUB_PREFIXES) or (root / "blobs").is_dir()):
        inside = _snapshot_of(root)
        return f"a download cache; give {inside}" if inside else "a download cache without a complete download"
    return None


def _snapshot_of(root: Path) -> Path | None:
    """The snapshot that `main` points to, else the newest."""
    main = root / "refs" / "main"
    if main.is_file() and (named := root / "snapshots" / main.read_text(errors="replace").strip()).is_dir():
        return named
    snapshots = [entry for entry in (root / "snapshots").glob("*") if entry.is_dir()]
    return max(snapshots, key=lambda entry: entry.stat().st_mtime, default=None)


def _adapter(folder: Path) -> str | None:
    path = folder / "adapter_config.json"
    if not path.exists():
        return None
    base = "its base model"
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):  # an adapter all the same
        base = str(json.loads(path.read_bytes())["base_model_name_or_path"])[:200]
    return (
        f"an adapter (LoRA) of {base}, not a model. Merge them with peft: PeftModel.from_pretrained(base, adapter)"
        ".merge_and_unload().save_pretrained(folder), and the tokenizer beside it"
    )


def _of_one_kind(pattern: str, text: str) -> Callable[[Path], str | None]:
    def look(folder: Path) -> str | None:
        found = sorted(folder.glob(pattern))
        return f"holds {found[0].name}: {text}" if found else None

    return look


def _weights_alone(folder: Path) -> str | None:
    found = sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin")))
    if not found or (folder / "config.json").exists():
        return None
    return f"holds {found[0].name}, but no config.json that says what model it is of; get the whole folder"


def _checkpoints(folder: Path) -> str | None:
    inside = [entry for entry in folder.iterdir() if entry.is_dir() and (entry / "config.json").exists()]
    if not inside:
        return None
    newest = max(inside, key=lambda entry: entry.stat().st_mtime)
    return f"no model itself, but has {len(inside)} inside; give one of them, such as {newest}"


_FOLDERS: tuple[Callable[[Path], str | None], ...] = (
    _empty,
    _hub_cache,
    _links,
    _adapter,
    _of_one_kind("model_index.json", "a diffusion pipeline, which makes images; only language models convert"),
    _of_one_kind(
        "context",
        "a checkpoint of NeMo 2. Export it there with nemo.collections.llm.export_ckpt(target='hf'), and convert "
        "what that writes",
    ),
    _of_one_kind("model_config.yaml", "an unpacked .nemo already; it is accepted wherever a .nemo is"),
    _of_one_kind(
        "*.gguf", f"a GGUF file. Load it with transformers (from_pretrained(folder, gguf_file=...)) and {_SAVE}"
    ),
    _of_one_kind("consolidated*.pth", _META),
    _of_one_kind("consolidated*.safetensors", "weights as Mistral packs them; take those named model*.safetensors"),
    _of_one_kind("tf_model.h5", f"weights of TensorFlow. Load it with transformers (from_tf=True) and {_SAVE}"),
    _of_one_kind("flax_model*.msgpack", f"weights of Flax. Load it with transformers (from_flax=True) and {_SAVE}"),
    _of_one_kind("*.incomplete", "a download that did not end; download it again"),
    _of_one_kind("global_step*", "a DeepSpeed checkpoint. Its zero_to_fp32.py makes pytorch_model.bin of it"),
    _of_one_kind("*.distcp", f"a distributed checkpoint of training. Load it with what made it and {_SAVE}"),
    _of_one_kind("model.safetensors.index.json.*", "a download that did not end; download it again"),
    _checkpoints,
    _weights_alone,
)
