r"""OpenAssistant trees -> training records (SteerLM steps 1 and 2).

    python scripts/preprocessing.py --input_file=data/trees.jsonl.gz --output_file_prefix=data/oasst \
        --type=TEXT_TO_VALUE        # for the value model; --type=VALUE_TO_TEXT for the SteerLM model
"""

import difflib
import inspect
import sys
from typing import Any

import fire

from steerlm_nemo.errors import InputError, exit_with_message


def preprocessing(
    input_file: str = "2023-04-12_oasst_all.trees.jsonl",
    output_file_prefix: str = "oasst_output",
    mask_role: str = "User",
    type: str = "TEXT_TO_VALUE",
    split_ratio: float = 0.95,
    seed: int = 10,
    *unexpected: Any,
    schema: str = "nemo12+lang",
    lang: Any = (),
    drop_deleted: bool = False,
    tree_state: Any = (),
    compat: str = "",
    strict: bool = False,
    **unknown: Any,
) -> None:
    """OpenAssistant trees -> <prefix>_train.jsonl and <prefix>_val.jsonl, one record per root-to-leaf path.

    Args:
        input_file: one message tree a line, .jsonl or .jsonl.gz
        output_file_prefix: what the names of the two outputs (and of <prefix>.rejects.jsonl) start with
        mask_role: the speaker that gets no loss in training
        type: TEXT_TO_VALUE (train the value model) or VALUE_TO_TEXT (train the SteerLM model)
        split_ratio: share of the trees for training
        seed: of the shuffle before the split
        schema: attributes to keep and their range: a preset (nemo12+lang, helpsteer5, ...) or a YAML file
        lang: keep only paths in these languages, for example en,de
        drop_deleted: leave out paths with a deleted message
        tree_state: keep only trees in this state, for example ready_for_export
        compat: nemo1.23 keeps the labels of User turns in VALUE_TO_TEXT and prints what NeMo prints
        strict: stop at the first unusable tree
    """
    refuse_unknown(unexpected, unknown)
    from steerlm_nemo.data.preprocessing import Filters, load_schema, preprocess
    from steerlm_nemo.records import Accounting

    if compat not in ("", "nemo1.23"):
        raise InputError(f"--compat is {compat!r}; the only reference known is nemo1.23")
    for flag, value, kinds in (("split_ratio", split_ratio, (int, float)), ("seed", seed, (int,))):
        if isinstance(value, bool) or not isinstance(value, kinds):
            raise InputError(f"--{flag} is {value!r}; it must be a number")
    chosen_schema = load_schema(str(schema))
    trees = Accounting.beside(str(output_file_prefix), strict=bool(strict))
    tally = preprocess(
        str(input_file),
        str(output_file_prefix),
        mask_role=str(mask_role),
        record_type=str(type),
        split_ratio=split_ratio,
        seed=seed,
        schema=chosen_schema,
        filters=Filters(listed("lang", lang), listed("tree_state", tree_state), bool(drop_deleted)),
        label_user_turns=bool(compat),
        trees=trees,
    )
    print(f"lang values: {sorted(tally.languages)}")
    print(tally.summary(trees), file=sys.stderr if compat else sys.stdout)
    for part in ("train", "val"):
        if not tally.conversations[part]:
            warn(f"{output_file_prefix}_{part}.jsonl is empty; change --split_ratio (now {split_ratio})")
    if chosen_schema.languages and (foreign := sorted(tally.languages - {*chosen_schema.languages})):
        warn(
            f"languages that schema {chosen_schema.name} does not know: {' '.join(foreign)}; leave them out with --lang"
        )


def listed(flag: str, value: Any) -> tuple[str, ...]:
    """`en`, `en,de` or what fire makes of them. Raises InputError for a flag without a value."""
    items = value.split(",") if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise InputError(f"--{flag} is {value!r}; give one value or several with commas between them")
    return tuple(str(item).strip() for item in items)


def refuse_unknown(unexpected: tuple[Any, ...], unknown: dict[str, Any]) -> None:
    """fire would run first and complain about a misspelt flag afterwards."""
    if unexpected:
        raise InputError(f"unexpected argument {unexpected[0]!r}; see --help")
    if unknown:
        name = min(unknown)
        known = [p.name for p in inspect.signature(preprocessing).parameters.values() if p.kind != p.VAR_KEYWORD]
        near = difflib.get_close_matches(name, known, n=1)
        raise InputError(f"unknown flag --{name}; " + (f"did you mean --{near[0]}?" if near else "see --help"))


def warn(message: str) -> None:
    print(f"WARNING: {message}", file=sys.stderr)


if __name__ == "__main__":
    # Where a function takes any flag, fire shows its help only behind a separate `--`.
    ask_help = {"--help", "-h"} & {*sys.argv[1:]}
    exit_with_message(lambda: fire.Fire(preprocessing, command=["--", "--help"] if ask_help else None))
