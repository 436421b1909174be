"""Plan a steering measurement: every value of every attribute, asked on prompts kept out of training.

    python scripts/plan_steering.py --prompts_file held_out_prompts.jsonl --schema toy6 --output_file requests.jsonl
    python scripts/steered_inference.py --input_file requests.jsonl --output_file responses.jsonl --port_num 1427
    python scripts/report.py --responses_file responses.jsonl ...

Where no exact reader of the text exists, let a value model read the responses:

    python scripts/plan_steering.py --responses_file responses.jsonl --output_file to_grade.jsonl
    python scripts/attribute_annotate.py --input_file_name to_grade.jsonl --output_file_name graded.jsonl
    python scripts/report.py --graded_responses_file graded.jsonl ...
"""

import argparse

from steerlm_nemo.errors import InputError, exit_with_message
from steerlm_nemo.flags import Flags


def parse_args() -> argparse.Namespace:
    parser = Flags(__doc__)
    flag = parser.flag
    flag("prompts_file", help="chat records; the first user text of each is a prompt")
    flag("responses_file", help="instead: answered requests, to be written as chat records for a value model")
    flag("output_file", required=True)
    flag("schema", help="attributes to sweep: a preset or a YAML file; default: those of PROMPTS_FILE, or nemo12+lang")
    flag("num_prompts", type=int, default=10, help="different prompts to use at most")
    flag("seed", type=int, default=1, help="of the other attributes' values")
    args = parser.parse_args()
    if (args.prompts_file is None) == (args.responses_file is None):
        parser.error("give either --prompts_file or --responses_file")
    return args


def main() -> None:
    args = parse_args()
    from steerlm_nemo.attributes import NEMO12_LANG, load_schema
    from steerlm_nemo.evaluation.steering_curves import first_prompts, plan, read_answers, to_grade
    from steerlm_nemo.outputs import require_writable
    from steerlm_nemo.record_report import told_schema
    from steerlm_nemo.records import atomic_output, dump_record

    require_writable(args.output_file)
    if args.num_prompts < 1:
        raise InputError(f"--num_prompts is {args.num_prompts}; at least one is needed")
    if args.prompts_file is not None:
        schema = load_schema(args.schema) if args.schema else told_schema(args.prompts_file) or NEMO12_LANG
        records = plan(first_prompts(args.prompts_file, args.num_prompts), schema, args.seed)
    else:
        records = to_grade(read_answers(args.responses_file))
    with atomic_output(args.output_file) as file:
        for record in records:
            file.write(dump_record(record) + "\n")
    print(f"{len(records)} records written to {args.output_file}")


if __name__ == "__main__":
    exit_with_message(main)
