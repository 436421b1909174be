"""Make a tiny, randomly initialised Llama, with a tokenizer trained on the trees it will learn from.

    python scripts/make_tiny_llama.py --trees_file results/demo/world/trees.jsonl.gz \
        --output_dir results/demo/base --schema toy6 --vocab_size 768 --max_position 512

The folder is a Hugging Face checkpoint (config.json, model.safetensors, tokenizer.model). Equal flags, equal bytes.
"""

import argparse
from pathlib import Path

from steerlm_nemo.errors import InputError, exit_with_message
from steerlm_nemo.flags import Flags


def parse_args() -> argparse.Namespace:
    parser = Flags(__doc__)
    flag = parser.flag
    flag("trees_file", required=True, help="OpenAssistant trees, .jsonl or .jsonl.gz")
    flag("output_dir", type=Path, required=True, help="folder to write; one of that name is replaced")
    flag(
        "schema", default="nemo12+lang", help="attributes whose lines the tokenizer must know: a preset or a YAML file"
    )
    flag("vocab_size", type=int, default=2048, help="a multiple of 8")
    flag("max_position", type=int, default=1024, help="tokens of context")
    flag("seed", type=int, default=1, help="of the weights")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    from steerlm_nemo.attributes import load_schema
    from steerlm_nemo.outputs import target_of
    from steerlm_nemo.records import read_records
    from steerlm_nemo.toy.llama import TinyLlama, train_tokenizer, tree_texts, write_random_llama

    if args.vocab_size < 320 or args.vocab_size % 8:
        raise InputError(
            f"--vocab_size is {args.vocab_size}; it must be a multiple of 8 and hold all 256 bytes: >= 320"
        )
    if args.output_dir.exists() and not (args.output_dir / "config.json").is_file():
        raise InputError(f"--output_dir {args.output_dir} exists and holds no model; give another name")
    target_of(args.output_dir, folder=True)
    texts = tree_texts(tree for _, tree in read_records(args.trees_file))
    tokenizer_model = train_tokenizer(texts, load_schema(args.schema), args.vocab_size)
    llama = TinyLlama(vocab_size=args.vocab_size, max_position=args.max_position)
    write_random_llama(args.output_dir, llama, tokenizer_model, args.seed)
    print(f"a random Llama of {llama.num_parameters():,} parameters written to {args.output_dir}")


if __name__ == "__main__":
    exit_with_message(main)
