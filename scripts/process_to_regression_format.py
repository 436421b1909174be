r"""Graded conversations -> text and label vector, one line per graded turn, for the regression reward model.

    python scripts/process_to_regression_format.py --input-file=data/helpsteer_train.jsonl \
        --output-file=data/helpsteer_train_reg.jsonl
"""

import sys
from collections.abc import Sequence

from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.flags import Flags


def main(argv: Sequence[str] | None = None) -> None:
    parser = Flags(__doc__)
    parser.flag("input_file", required=True, help="chat records, .jsonl (also .gz or .zst)")
    parser.flag("output_file", required=True, help="where the lines go; rejects and report go beside it")
    parser.flag("strict", action="store_true", help="stop at the first unusable record")
    parser.add_argument("-v", "--verbose", action="store_true", help="print how often each attribute has each value")
    args = parser.parse_args(argv)

    from steerlm_nemo.data.regression import note_on, process_to_regression_format
    from steerlm_nemo.data.statistics import AttributeStatistics
    from steerlm_nemo.records import Accounting

    records = Accounting.beside(args.output_file, strict=args.strict)
    statistics = AttributeStatistics()
    others = process_to_regression_format(args.input_file, args.output_file, records, statistics)
    attributes = {name: dict(sorted(counts.items())) for name, counts in statistics.counts.items()}
    records.save(f"{args.output_file}.report.json", input_file=args.input_file, attributes=attributes)
    print(f"records: {records.summary()}")
    if note := note_on(others):
        print(f"WARNING: attributes without a place in the vector, with their turns: {note}", file=sys.stderr)
    if args.verbose:
        print(statistics.table())


if __name__ == "__main__":
    exit_with_message(main)
