"""B3: Hugging Face Llama -> .nemo -> Hugging Face, against copying the same bytes and against the stock algorithm.

The model (a 1.1 GB Llama in bf16, and one of half the layers for the memory claim) and its tokenizer are made here, at
random. Peers: `copy` reads and writes as many bytes and waits for the disk; `stock` does what NVIDIA's converter does:
load everything with transformers, concatenate, build NeMo's model, save it. The logits check that a conversion ends
with is switched off, as the stock converter has none, and measured apart.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

from side_by_side import Contestant, Run, in_turns, measured_process, report, timed

from steerlm_nemo.toy.llama import TinyLlama

ROOT = Path(__file__).resolve().parents[2]
CONVERT, EXPORT = (ROOT / "scripts" / name for name in ("convert_hf_llama_to_nemo.py", "convert_nemo_to_hf_llama.py"))
STOCK = Path(__file__).with_name("stock_conversion.py")
LAYERS = (5, 10)
REPEATS = 9
BLOCK = 8 * 2**20


def llama(num_layers: int, hidden_size: int = 2048, ffn_size: int = 5632) -> TinyLlama:
    return TinyLlama(32000, 2048, hidden_size, num_layers, num_heads=32, num_key_value_heads=4, ffn_size=ffn_size)


def write_llama(folder: Path, model: TinyLlama) -> None:
    """A random Llama in bf16, one safetensors file per layer, with a tokenizer of as many words as it has rows."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    weight_map = {}
    for number, (_, group) in enumerate(groupby(model.shapes(), key=lambda entry: entry[0].split(".")[:3])):
        name = f"model-{number:05d}.safetensors"
        tensors = {key: (0.02 * torch.randn(shape)).to(torch.bfloat16) for key, shape in group}
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    words = [*special.values(), *(f"w{number}" for number in range(model.vocab_size - len(special)))]
    vocab = {word: number for number, word in enumerate(words)}
    words_model = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
    files = {
        "model.safetensors.index.json": {"metadata": {}, "weight_map": weight_map},
        "config.json": model.config() | {"torch_dtype": "bfloat16"},
        "tokenizer.json": {"version": "1.0", "added_tokens": [], "model": words_model},
        "tokenizer_config.json": {"tokenizer_class": "PreTrainedTokenizerFast", **special},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


def touch_memory(gigabytes: int) -> None:
    """Write to so much of the free memory.

    A virtual machine gets its memory from the host at the first touch, at seconds per GB, and may have to give it back
    when it is free for a while; without this the contestant that happens to get fresh pages loses.
    """
    import numpy

    held = [numpy.ones(2**30, dtype=numpy.uint8) for _ in range(gigabytes)]
    del held


def copy_and_sync(source: Path, target: Path) -> None:
    """All weights of `source` into one file, on disk when this returns."""
    with target.open("wb") as out:
        for path in sorted(source.glob("*.safetensors")):
            with path.open("rb") as file:
                shutil.copyfileobj(file, out, BLOCK)
        out.flush()
        os.fsync(out.fileno())


def fresh(call: Callable[[], Run], source: Path, target: Path) -> Run:
    """`call` under equal conditions: no result yet, no other data to be written, its input and memory for its output at
    hand."""
    shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)
    subprocess.run(["sync"], check=True)
    touch_memory(2)
    for path in source.iterdir() if source.is_dir() else [source]:
        with path.open("rb") as file:
            while file.read(BLOCK):
                pass
    return call()


def script(path: Path, source: Path, target: Path, *flags: str) -> Run:
    argv = [sys.executable, str(path), "--in-file", str(source), "--out-file", str(target), *flags]
    return fresh(lambda: measured_process(argv), source, target)


def ratio_to_copy(runs: dict[str, Contestant], name: str, start_up: str) -> float:
    """Median of wall time without start-up, each against the copy of its own turn: the disk's speed drifts."""
    turns = zip(runs[name].runs, runs[start_up].runs, runs["copy and fsync"].runs, strict=True)
    return statistics.median((one.seconds - start.seconds) / copy.seconds for one, start, copy in turns)


def main() -> None:
    with tempfile.TemporaryDirectory(dir=os.environ.get("BENCH_DIR"), prefix="bench-convert-") as name:
        work = Path(name)
        half, large, small = (work / size for size in ("half", "large", "small"))
        write_llama(half, llama(LAYERS[0]))
        write_llama(large, llama(LAYERS[1]))
        write_llama(small, llama(1, hidden_size=32, ffn_size=32))  # 4 MB: all that a conversion does but for the bytes
        num_bytes = sum(path.stat().st_size for path in large.glob("*.safetensors"))
        largest = max(2 * math.prod(shape) for _, shape in llama(1).shapes())
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        touch_memory(min(16, free * 8 // 10 // 2**30))
        copied, nemo, back = work / "copy.bin", work / "ours.nemo", work / "back"
        small_nemo = work / "small.nemo"
        script(CONVERT, small, small_nemo, "--no_check")

        def stock() -> Run:
            argv = [sys.executable, str(STOCK), str(large), str(work / "stock.nemo")]
            env = {"OMP_NUM_THREADS": str(os.cpu_count())}
            return fresh(lambda: measured_process(argv, env), large, work / "stock.nemo")

        quick = {
            "copy and fsync": lambda: fresh(lambda: timed(lambda: copy_and_sync(large, copied)), large, copied),
            "start-up: 4 MB converted": lambda: script(CONVERT, small, work / "start.nemo", "--no_check"),
            "converted": lambda: script(CONVERT, large, nemo, "--no_check"),
            "converted, half the layers": lambda: script(CONVERT, half, work / "half.nemo", "--no_check"),
            "start-up: 4 MB exported": lambda: script(EXPORT, small_nemo, work / "start"),
            "exported": lambda: script(EXPORT, nemo, back),
        }
        once = {
            "stock algorithm": stock,
            "converted and checked": lambda: script(CONVERT, large, work / "checked.nemo"),
        }
        runs = in_turns(quick, REPEATS) | in_turns(once, 1)
        ours = runs["converted"]
        peaks = {name: (contestant.peak_rss_bytes or 0) / 1e6 for name, contestant in runs.items()}
        report(
            "convert",
            runs,
            {
                "model bytes": num_bytes,
                "MB/s of the copy": num_bytes / runs["copy and fsync"].seconds / 1e6,
                "without start-up, ratio to copy and fsync (bar 1.3)": ratio_to_copy(
                    runs, "converted", "start-up: 4 MB converted"
                ),
                "times faster than stock, start-up included (bar 8)": runs["stock algorithm"].seconds / ours.seconds,
                "peak RSS, MB": peaks["converted"],
                "peak RSS with half the layers, MB": peaks["converted, half the layers"],
                "bar: 3 x largest tensor + 300 MB": (3 * largest + 300e6) / 1e6,
                "peak RSS of the stock algorithm, MB": peaks["stock algorithm"],
                "export without start-up, ratio to copy and fsync": ratio_to_copy(
                    runs, "exported", "start-up: 4 MB exported"
                ),
                "export, peak RSS, MB": peaks["exported"],
                "seconds that the logits check adds": runs["converted and checked"].seconds - ours.seconds,
            },
        )


if __name__ == "__main__":
    main()
