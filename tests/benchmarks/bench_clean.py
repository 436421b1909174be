"""Cleaning, masking and tokenising genuine OpenAssistant threads: NeMo's way, ours, and the machine's limit.

NeMo's way is its own GPTSFTChatDataset and the loop of its data_clean: mask every record, test the window, write the
lines that stay. Imports and the building of its dataset are not counted, reading and writing are. The limit is one
SentencePiece call per record for the whole text, on one thread. Ours starts cold in every run. Then ours again on
SCALE_UP times the records, in one process and in two. Every token and mask must be equal.

    python tests/benchmarks/bench_clean.py [TREES.jsonl.gz TOKENIZER.model]
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from side_by_side import Run, in_turns, report, timed

from steerlm_nemo.conversation import Conversation
from steerlm_nemo.data.cleaning import Cleaner, clean_file
from steerlm_nemo.data.preprocessing import Options, preprocess
from steerlm_nemo.records import Accounting, read_records
from steerlm_nemo.template import ChatTemplate
from steerlm_nemo.tokenizer import SentencePieceTokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
SEQ_LEN = 4096
REPEATS = 3
SCALE_UP = 30
MARKERS = ("system_turn_start", "turn_start", "label_start", "end_of_turn", "end_of_name")


def main() -> None:
    given = [Path(argument) for argument in sys.argv[1:3]]
    trees, model = given or (
        SHARED / "oasst1-en-validation" / "trees.jsonl.gz",
        SHARED / "tokenizers" / "llama2-tokenizer.model",
    )
    if not trees.is_file() or not model.is_file():
        print(f"skipped: no genuine trees at {trees} or no tokenizer at {model}; give both as arguments")
        return
    with tempfile.TemporaryDirectory() as name:
        compare(trees, model, Path(name))


def compare(trees: Path, model: Path, folder: Path) -> None:
    records = Accounting.beside(folder / "out")
    preprocess(trees, folder / "out", split_ratio=1.0, seed=10, options=Options(), trees=records)
    source = folder / "out_train.jsonl"
    template = ChatTemplate()
    conversations = [Conversation.from_record(record, ref) for ref, record in read_records(source)]
    texts = ["".join(segment.text for segment in template.segments(one)) for one in conversations]
    nemo = nemo_dataset(source, model, template, folder)
    tokenizer = SentencePieceTokenizer(model)
    for index, one in enumerate(conversations):
        item, rendered = nemo[index], template.render(one, tokenizer)
        if item["input_ids"].tolist() != [*rendered.token_ids] or item["mask"].tolist() != [*rendered.loss_mask]:
            sys.exit(f"{one.ref}: tokens or mask differ")

    results = in_turns(
        {
            "NeMo": lambda: timed(lambda: clean_as_nemo(nemo, source, folder / "nemo.jsonl")),
            "ours": lambda: clean(source, model, template, folder, 1),
            "limit: one bare pass": lambda: bare_pass(model, texts),
        },
        REPEATS,
    )
    if (folder / "nemo.jsonl").read_bytes() != (folder / "ours.jsonl").read_bytes():
        sys.exit("the outputs differ")
    large = folder / "large.jsonl"
    large.write_bytes(source.read_bytes() * SCALE_UP)
    contestants: dict[str, Callable[[], Run]] = {
        f"ours, {SCALE_UP} times the records, {workers} process{'es' * (workers > 1)}": (
            lambda workers=workers: clean(large, model, template, folder, workers)  # type: ignore[misc]
        )
        for workers in (1, 2)
    }
    scaled = in_turns(contestants, REPEATS)
    peer, own, limit = results.values()
    one_process, two = scaled.values()
    num_tokens = sum(len(template.render(one, tokenizer).token_ids) for one in conversations)
    report(
        "clean",
        {**results, **scaled},
        {
            "records": len(conversations),
            "tokens": num_tokens,
            "characters per record": sum(map(len, texts)) / len(texts),
            "tokens, masks and outputs equal": True,
            "records per second, NeMo": len(conversations) / peer.seconds,
            "records per second, ours": len(conversations) / own.seconds,
            "tokens per second, ours": num_tokens / own.seconds,
            "speed-up over NeMo": peer.seconds / own.seconds,
            "share of the limit's speed": limit.seconds / own.seconds,
            "speed-up of two processes over one": one_process.seconds / two.seconds,
        },
    )


def nemo_dataset(source: Path, model: Path, template: ChatTemplate, folder: Path) -> Any:
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "24.07")
    from nemo.collections.common.tokenizers.sentencepiece_tokenizer import SentencePieceTokenizer as NemoTokenizer
    from nemo.collections.nlp.data.language_modeling.megatron.gpt_sft_chat_dataset import GPTSFTChatDataset

    return GPTSFTChatDataset(
        file_path=str(source),
        tokenizer=NemoTokenizer(str(model)),
        max_seq_length=SEQ_LEN,
        hf_dataset=True,
        index_mapping_dir=str(folder / "cache"),
        memmap_workers=1,
        special_tokens={marker: getattr(template, marker) for marker in MARKERS},
    )


def clean_as_nemo(dataset: Any, source: Path, output: Path) -> None:
    """What NeMo's data_clean does once its dataset is there."""
    removed = set()
    for index in range(len(dataset)):
        try:
            if dataset[index]["mask"][: SEQ_LEN + 1].sum().item() == 0:
                removed.add(index)
        except Exception:
            removed.add(index)
    with source.open(encoding="utf-8") as lines, output.open("w", encoding="utf-8") as file:
        for index, line in enumerate(lines):
            if index not in removed:
                file.write(json.dumps(json.loads(line), ensure_ascii=False) + "\n")


def clean(source: Path, model: Path, template: ChatTemplate, folder: Path, num_workers: int) -> Run:
    cleaner = Cleaner(template, SentencePieceTokenizer(model), SEQ_LEN)
    output = folder / "ours.jsonl"
    accounting = Accounting.beside(output)
    return timed(lambda: clean_file(source, output, cleaner, accounting, num_workers=num_workers))


def bare_pass(model: Path, texts: list[str]) -> Run:
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    return timed(lambda: [processor.encode(text) for text in texts])


if __name__ == "__main__":
    main()
