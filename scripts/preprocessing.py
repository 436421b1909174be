r"""Any dataset of the flow -> training records (SteerLM steps 1 and 2).

    python scripts/preprocessing.py --input_file=data/trees.jsonl.gz --output_file_prefix=data/oasst \
        --type=TEXT_TO_VALUE        # for the value model; --type=VALUE_TO_TEXT for the SteerLM model

OpenAssistant trees and messages, HelpSteer, HH-RLHF, CValues, chat and instruction files; docs/data.md lists them all.
The shape is told by the keys; --format overrides. One command for all of them, because what follows is the same for
each: shuffle, split, write, account.
"""

import sys

from steerlm_nemo.attributes import Attributes
from steerlm_nemo.errors import InputError, exit_with_message, listed, shown
from steerlm_nemo.flags import fire_as_typed


def preprocessing(
    input_file: str = "2023-04-12_oasst_all.trees.jsonl",
    output_file_prefix: str = "oasst_output",
    mask_role: str = "User",
    type: str = "TEXT_TO_VALUE",
    split_ratio: float = 0.95,
    seed: int = 10,
    *,
    format: str = "auto",
    schema: str = "",
    lang: tuple[str, ...] = (),
    drop_deleted: bool = False,
    tree_state: tuple[str, ...] = (),
    labels_from: str = "",
    fill: str = "",
    system: str | None = None,
    compat: str = "",
    strict: bool = False,
) -> None:
    """A dataset -> <prefix>_train.jsonl and <prefix>_val.jsonl; of trees, one record per root-to-leaf path.

    Args:
        input_file: JSON lines, a JSON array (both also .gz or .zst), Parquet, a dataset's directory, or hf://owner/name
        output_file_prefix: what the names of the outputs, and of <prefix>.report.json and .rejects.jsonl, start with
        mask_role: the speaker that gets no loss in training
        type: TEXT_TO_VALUE (train the value model) or VALUE_TO_TEXT (train the SteerLM model)
        split_ratio: share of the trees for training; other data are split by first question
        seed: of the shuffle before the split
        format: shape of the input: auto (by its keys), oasst-trees, oasst-messages, helpsteer, messages, ...
        schema: attributes to keep and their range: a preset (nemo12+lang, helpsteer5, ...) or a YAML file
        lang: keep only paths in these languages, for example en,de
        drop_deleted: leave out paths with a deleted message
        tree_state: keep only trees in this state, for example ready_for_export
        labels_from: OpenAssistant data (joined by message id) or chat records whose labels fill in what is missing
        fill: attributes for graded responses that lack them, for example violence:0,fails_task:0
        system: system prompt of records that have none of their own
        compat: nemo1.23 keeps the labels of User turns in VALUE_TO_TEXT and prints what NeMo prints
        strict: stop at the first unusable record
    """
    from steerlm_nemo.attributes import load_schema
    from steerlm_nemo.data.options import Filters, Options
    from steerlm_nemo.data.preprocessing import preprocess
    from steerlm_nemo.data.sources.formats import HELPSTEER2_PAIRS
    from steerlm_nemo.record_report import SUFFIX, schema_facts
    from steerlm_nemo.records import Accounting

    if compat not in ("", "nemo1.23"):
        raise InputError(f"--compat is {compat!r}; the only reference known is nemo1.23")
    chosen_schema = load_schema(schema) if schema else None
    options = Options(
        mask_role=mask_role,
        record_type=type,
        schema=chosen_schema,
        filters=Filters(lang, tree_state, drop_deleted),
        compat=bool(compat),
        system=system,
        fill=attributes_given("fill", fill),
    )
    trees = Accounting.beside(output_file_prefix, strict=strict)
    tally = preprocess(
        input_file,
        output_file_prefix,
        split_ratio=split_ratio,
        seed=seed,
        options=options,
        trees=trees,
        format_name=format,
        labels_from=labels_from or None,
    )
    asked = {"type": type, "mask_role": mask_role, "split_ratio": split_ratio, "seed": seed, "compat": bool(compat)}
    asked.update(schema_facts(tally.schema))
    trees.save(f"{output_file_prefix}{SUFFIX}", input_file=input_file, **asked, **tally.as_dict())
    languages = sorted(tally.languages)
    print(f"lang values: {languages if compat else shown(languages)}")
    print(tally.summary(trees), file=sys.stderr if compat else sys.stdout)
    for part in ("train", "val"):
        if not tally.conversations[part]:
            warn(f"{output_file_prefix}_{part}.jsonl is empty; change --split_ratio (now {split_ratio})")
    if tally.format == HELPSTEER2_PAIRS:
        warn(
            "the labels are strengths of preference, quality:-3 to 3, and grade neither response: these records are "
            "for process_to_regression_format.py only; data_clean.py and build_sft_data.py refuse them"
        )
    if foreign := tally.foreign_languages():
        unknown = listed(foreign, " ")
        warn(f"languages that schema {tally.schema.name} does not know: {unknown}; leave them out with --lang")


def attributes_given(flag: str, line: str) -> Attributes:
    """Raises InputError for anything else than an attribute line."""
    try:
        return Attributes.parse(line)
    except ValueError as err:
        raise InputError(
            f"--{flag} is {shown(line)}; give an attribute line such as violence:0,humor:0: {err}"
        ) from err


def warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr)


if __name__ == "__main__":
    exit_with_message(lambda: fire_as_typed(preprocessing))
