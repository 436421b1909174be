"""Report how well a value model grades and a SteerLM model steers: summary.json and report.html.

    python scripts/report.py --graded_file val_value_output.jsonl --graded_responses_file graded.jsonl \
        --schema nemo12+lang --output_dir results/report

--graded_file: turns with human attributes (`gt_label`) and the value model's (`label`), by
scripts/attribute_annotate.py. Responses come from scripts/plan_steering.py and scripts/steered_inference.py; the toy
world's are read exactly from their text (--responses_file, --schema toy6), others by the value model
(--graded_responses_file). Exit code 1 if a toy run misses a bar.
"""

import argparse
import sys
import time
from pathlib import Path

from steerlm_nemo.errors import InputError, exit_with_message
from steerlm_nemo.flags import Flags


def parse_args() -> argparse.Namespace:
    parser = Flags(__doc__)
    flag = parser.flag
    flag("graded_file", required=True, help="annotated JSONL of held-out turns")
    flag("responses_file", help="answered steering requests about the toy world")
    flag("graded_responses_file", help="instead: answered steering requests, graded by the value model")
    flag("schema", help="attributes to report: a preset or a YAML file; default: those of GRADED_FILE, or nemo12+lang")
    flag("output_dir", type=Path, required=True)
    flag("stages_file", help='JSON: {"name": seconds} of the stages before this one')
    flag("value_log_dir", help="the value model's explicit_log_dir, for its loss curve")
    flag("steerlm_log_dir", help="the SteerLM model's explicit_log_dir, for its loss curve")
    args = parser.parse_args()
    if (args.responses_file is None) == (args.graded_responses_file is None):
        parser.error("give either --responses_file or --graded_responses_file")
    return args


def main() -> None:
    started = time.monotonic()
    args = parse_args()
    from steerlm_nemo.attributes import NEMO12_LANG, TOY6, load_schema
    from steerlm_nemo.evaluation import grading as value_model
    from steerlm_nemo.evaluation import steering_curves as steering
    from steerlm_nemo.evaluation.losses import read_losses
    from steerlm_nemo.outputs import require_writable
    from steerlm_nemo.record_report import told_schema
    from steerlm_nemo.report import steerlm as report
    from steerlm_nemo.toy.world import read_attributes

    for name in report.FILES:
        require_writable(Path(args.output_dir, name))
    schema = load_schema(args.schema) if args.schema else told_schema(args.graded_file) or NEMO12_LANG
    toy = args.responses_file is not None
    if toy and schema != TOY6:
        raise InputError("--responses_file is read by the toy world's reader, which knows --schema toy6 only")
    if toy:
        steered = steering.read_with(read_attributes, steering.read_answers(args.responses_file))
    else:
        steered = steering.read_graded(args.graded_responses_file, schema)
    log_dirs = {"value model": args.value_log_dir, "SteerLM model": args.steerlm_log_dir}
    stages = report.read_stages(args.stages_file) if args.stages_file else {}
    results = report.Results(
        toy=toy,
        schema=schema,
        measured_by=report.EXACT_READER if toy else report.VALUE_MODEL_READER,
        value_model=value_model.evaluate(args.graded_file, schema),
        steering=steering.measure(steered, schema),
        steered=steered,
        losses={name: read_losses(folder) for name, folder in log_dirs.items() if folder},
        stages=[{"name": name, "seconds": seconds} for name, seconds in stages.items()]
        + [{"name": "report", "seconds": round(time.monotonic() - started, 1)}],
    )
    report.write_report(results, args.output_dir)
    print(report.text_report(results))
    print(f"{args.output_dir}/summary.json and {args.output_dir}/report.html written")
    if missed := results.missed_bars():
        print("BELOW THE BAR: " + "; ".join(missed), file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    exit_with_message(main)
