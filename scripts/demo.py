"""The whole SteerLM flow on this machine, two ranks, in one command; `make demo` runs it.

    python scripts/demo.py                              # the toy world: no download, every figure measured exactly
    python scripts/demo.py --data trees.jsonl.gz        # the same flow on genuine OpenAssistant trees

Stopped at any point, it goes on where it was when run again. Each stage is a script that can be run by hand; its
command and output are in OUTPUT_DIR/logs/. Ends with OUTPUT_DIR/summary.json and OUTPUT_DIR/report.html.
"""

import argparse
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steerlm_nemo.errors import InputError, exit_with_message
from steerlm_nemo.flags import Flags

if TYPE_CHECKING:
    from steerlm_nemo.pipeline.runner import Stage

SCRIPTS = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Sizes:
    """What differs between the toy world and genuine trees."""

    schema: str
    vocab_size: int
    max_position: int  # tokens of context
    seq_len: int  # tokens of a record; the rest of the context is for the attribute line or the response
    split_ratio: float
    num_prompts: int
    tokens_to_generate: int
    annotate_batch_size: int
    annotate_flags: tuple[str, ...] = ()
    value_overrides: tuple[str, ...] = ()
    steerlm_overrides: tuple[str, ...] = ()


TOY = Sizes(
    schema="toy6",
    vocab_size=768,
    max_position=512,
    seq_len=256,
    split_ratio=0.85,
    num_prompts=12,
    tokens_to_generate=96,
    annotate_batch_size=32,
)
_SHORT = (  # a random model of this size learns little from genuine text; the flow is what is shown
    "trainer.sft.max_steps=60",
    "trainer.sft.val_check_interval=30",
    "model.data.attribute_schema=oasst10+lang",
    "model.data.train_ds.max_seq_length=1024",
    "model.data.train_ds.global_batch_size=16",
    "model.data.train_ds.micro_batch_size=4",
    "model.data.validation_ds.global_batch_size=16",
    "model.data.validation_ds.micro_batch_size=4",
)
GENUINE = Sizes(
    schema="oasst10+lang",
    vocab_size=2048,
    max_position=1024,
    seq_len=768,
    split_ratio=0.9,
    num_prompts=5,
    tokens_to_generate=64,
    annotate_batch_size=16,
    annotate_flags=("--allow_rejected",),  # responses longer than the context; training would cut them, grading cannot
    value_overrides=_SHORT,
    steerlm_overrides=_SHORT,
)


def parse_args() -> argparse.Namespace:
    parser = Flags(__doc__)
    parser.flag("data", type=Path, help="OpenAssistant trees, .jsonl or .jsonl.gz; without it, the toy world")
    parser.flag("output_dir", type=Path, default=Path("results/demo"))
    parser.flag("num_trees", type=int, default=700, help="of the toy world")
    parser.flag("seed", type=int, default=1)
    parser.flag("fresh", action="store_true", help="forget what an earlier run has done")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from steerlm_nemo.pipeline.runner import STATE_FILE, Flow
    from steerlm_nemo.records import require_file

    if args.data is not None:
        require_file(args.data)
    if args.fresh and args.output_dir.exists():
        if not (args.output_dir / STATE_FILE).is_file():
            raise InputError(f"--fresh would delete {args.output_dir}, which no earlier run of this program made")
        shutil.rmtree(args.output_dir)
    # Either way of stopping ends the servers, too; and a shell that starts us in the background leaves SIGINT ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    flow = Flow(args.output_dir)
    for stage in stages(args):
        flow.run(stage)
    sys.exit(report(args, flow.seconds))


def stages(args: argparse.Namespace) -> "Iterator[Stage]":
    """The flow in order. Every path a stage reads is an input, so a change upstream redoes what follows."""
    from steerlm_nemo.pipeline.runner import PORT, Stage

    sizes = TOY if args.data is None else GENUINE
    out: Path = args.output_dir
    base, base_nemo = out / "base" / "llama", out / "convert" / "base.nemo"
    prompts = out / "world" / "held_out_prompts.jsonl"
    if args.data is None:
        trees = out / "world" / "trees.jsonl.gz"
        command = script("make_toy_world", output_dir=trees.parent, num_trees=args.num_trees, seed=args.seed)
        yield Stage("world", trees.parent, [command], [], [trees, prompts])
    else:
        trees = args.data

    tokenizer = base / "tokenizer.model"
    tiny = {"schema": sizes.schema, "vocab_size": sizes.vocab_size, "max_position": sizes.max_position}
    command = script("make_tiny_llama", trees_file=trees, output_dir=base, seed=args.seed, **tiny)
    yield Stage("base", out / "base", [command], [trees], [base / "model.safetensors", tokenizer, base / "config.json"])

    # The logits check costs a start of NeMo, and what this model computes is random.
    command = [*script("convert_hf_llama_to_nemo", **{"in-file": base, "out-file": base_nemo}), "--no_check"]
    inputs = [base / "model.safetensors", tokenizer, base / "config.json"]
    yield Stage("convert", base_nemo.parent, [command], inputs, [base_nemo])

    folder = out / "preprocess"
    raw = [folder / f"t2v_{part}.jsonl" for part in ("train", "val")]
    command = script(
        "preprocessing", input_file=trees, output_file_prefix=folder / "t2v", type="TEXT_TO_VALUE", mask_role="User",
        schema=sizes.schema, split_ratio=sizes.split_ratio, seed=args.seed,
    )  # fmt: skip
    yield Stage("preprocess", folder, [command], [trees], raw)

    clean = [out / "clean" / path.name for path in raw]
    commands = [
        [*clean_command(source, target, tokenizer, sizes.seq_len), "--trim_turns"]
        for source, target in zip(raw, clean, strict=True)
    ]
    yield Stage("clean", out / "clean", commands, [*raw, tokenizer], clean)

    yield train_stage("train-value", "toy_value", base_nemo, clean, sizes.value_overrides, out)
    value_nemo = trained(out, "train-value")

    # The records it was trained on, contexts and all, come back as VALUE_TO_TEXT. Human labels stay as gt_label: on the
    # held-out part they show how well the model grades.
    annotated = [out / "annotate" / f"v2t_{part}.jsonl" for part in ("train", "val")]
    commands = [
        [*annotate_command(source, target, sizes), "--output_type=VALUE_TO_TEXT"]
        for source, target in zip(clean, annotated, strict=True)
    ]
    inputs = [value_nemo, *clean]
    yield Stage("annotate", out / "annotate", commands, inputs, annotated, server(value_nemo), "serve-value")

    ready = [out / "clean-annotated" / path.name for path in annotated]
    commands = [
        clean_command(source, target, tokenizer, sizes.max_position)
        for source, target in zip(annotated, ready, strict=True)
    ]
    yield Stage("clean-annotated", ready[0].parent, commands, [*annotated, tokenizer], ready)

    yield train_stage("train-steerlm", "toy_steerlm", base_nemo, ready, sizes.steerlm_overrides, out)
    steerlm_nemo = trained(out, "train-steerlm")

    folder = out / "steer"
    requests, responses = folder / "requests.jsonl", folder / "responses.jsonl"
    source = prompts if args.data is None else annotated[1]
    plan = script(
        "plan_steering", prompts_file=source, output_file=requests, schema=sizes.schema,
        num_prompts=sizes.num_prompts, seed=args.seed,
    )  # fmt: skip
    ask = script(
        "steered_inference", input_file=requests, output_file=responses, host="127.0.0.1", port_num=PORT,
        tokens_to_generate=sizes.tokens_to_generate, batch_size=60,
    )  # fmt: skip
    yield Stage(
        "steer", folder, [plan, ask], [steerlm_nemo, source], [responses], server(steerlm_nemo), "serve-steerlm"
    )

    if args.data is not None:
        folder = out / "grade-responses"
        commands = [
            script("plan_steering", responses_file=responses, output_file=folder / "to_grade.jsonl"),
            annotate_command(folder / "to_grade.jsonl", folder / "graded.jsonl", sizes),
        ]
        outputs = [folder / "graded.jsonl"]
        inputs = [value_nemo, responses]
        yield Stage("grade-responses", folder, commands, inputs, outputs, server(value_nemo), "serve-value-again")


def script(name: str, **flags: object) -> list[str]:
    return [sys.executable, str(SCRIPTS / f"{name}.py"), *(f"--{key}={value}" for key, value in flags.items())]


def clean_command(source: Path, target: Path, tokenizer: Path, seq_len: int) -> list[str]:
    flags = {"dataset_file": source, "output_file": target, "model_file": tokenizer, "seq_len": seq_len}
    return script("data_clean", library="sentencepiece", **flags)


def annotate_command(source: Path, target: Path, sizes: Sizes) -> list[str]:
    from steerlm_nemo.pipeline.runner import PORT

    flags = {"input_file_name": source, "output_file_name": target, "batch_size": sizes.annotate_batch_size}
    return [*script("attribute_annotate", host="127.0.0.1", port_num=PORT, **flags), *sizes.annotate_flags]


def train_stage(name: str, config: str, base: Path, data: list[Path], overrides: tuple[str, ...], out: Path) -> "Stage":
    from steerlm_nemo.pipeline.runner import Stage

    train, val = data
    command = [
        sys.executable, str(SCRIPTS / "train_gpt_sft.py"), f"--config-name={config}",
        "trainer.devices=2", "model.tensor_model_parallel_size=2",
        f"model.restore_from_path={base}",
        f"model.data.train_ds.file_path={train}", f"model.data.validation_ds.file_path={val}",
        f"exp_manager.explicit_log_dir={out / name}",
        *overrides,
    ]  # fmt: skip
    return Stage(name, out / name, [command], [base, train, val], [trained(out, name)])


def trained(out: Path, name: str) -> Path:
    return out / name / "checkpoints" / "megatron_gpt_sft.nemo"


def server(model: Path) -> list[str]:
    from steerlm_nemo.pipeline.runner import PORT

    return [
        sys.executable, str(SCRIPTS / "megatron_gpt_eval.py"), f"gpt_model_file={model}", "server=True",
        "trainer.devices=2", "tensor_model_parallel_size=2", f"port={PORT}",
    ]  # fmt: skip


def report(args: argparse.Namespace, seconds: dict[str, float]) -> int:
    """Run scripts/report.py, in sight; its exit code says whether the toy world's bars are met."""
    import subprocess

    out: Path = args.output_dir
    (out / "stages.json").write_text(json.dumps(seconds), encoding="utf-8")
    steered = (
        {"responses_file": out / "steer" / "responses.jsonl"}
        if args.data is None
        else {"graded_responses_file": out / "grade-responses" / "graded.jsonl"}
    )
    command = script(
        "report", graded_file=out / "annotate" / "v2t_val.jsonl", output_dir=out,
        schema=(TOY if args.data is None else GENUINE).schema, stages_file=out / "stages.json",
        value_log_dir=out / "train-value", steerlm_log_dir=out / "train-steerlm", **steered,
    )  # fmt: skip
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    exit_with_message(main)
