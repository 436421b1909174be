r"""Annotated conversations -> training data of the attribute-conditioned model, and the same as plain `messages`.

    python scripts/build_sft_data.py --input-file=data/train.annotated.jsonl --output-file=data/train_sft.jsonl \
        --messages-file=data/train_messages.jsonl
"""

from collections.abc import Sequence

from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.flags import Flags


def main(argv: Sequence[str] | None = None) -> None:
    parser = Flags(__doc__)
    parser.flag("input_file", required=True, help="chat records with labels, .jsonl (also .gz or .zst)")
    parser.flag("output_file", required=True, help="VALUE_TO_TEXT records; rejects and report go beside it")
    parser.flag("messages_file", help="the same conversations as `messages`, attributes in the user's turn")
    parser.flag("strict", action="store_true", help="stop at the first unusable record")
    parser.add_argument("-v", "--verbose", action="store_true", help="print how often each attribute has each value")
    args = parser.parse_args(argv)

    from steerlm_nemo.data.sft_data import build_sft_data
    from steerlm_nemo.data.statistics import AttributeStatistics
    from steerlm_nemo.record_report import SUFFIX, schema_facts, told_schema
    from steerlm_nemo.records import Accounting

    told = schema_facts(told_schema(args.input_file))
    records = Accounting.beside(args.output_file, strict=args.strict)
    statistics = AttributeStatistics()
    build_sft_data(args.input_file, args.output_file, records, statistics, args.messages_file)
    attributes = {name: dict(sorted(counts.items())) for name, counts in statistics.counts.items()}
    records.save(f"{args.output_file}{SUFFIX}", input_file=args.input_file, **told, attributes=attributes)
    print(f"records: {records.summary()}")
    if args.verbose:
        print(statistics.table())


if __name__ == "__main__":
    exit_with_message(main)
