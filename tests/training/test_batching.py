"""Batches of similar length: every conversation once per epoch, the same order whoever asks, less padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerlm_nemo.conversation import Conversation
from steerlm_nemo.data.preprocessing import Options, preprocess
from steerlm_nemo.records import Accounting, read_records
from steerlm_nemo.template import ChatTemplate
from steerlm_nemo.tokenizer import SentencePieceTokenizer
from steerlm_nemo.training.batching import grouped_by_length, padding_share

LENGTHS = np.random.default_rng(0).lognormal(6, 0.8, size=5_003).astype(int).tolist()


@given(st.lists(st.integers(1, 4096), max_size=300), st.integers(1, 40), st.integers(0, 2**31))
def test_every_conversation_comes_once_but_for_a_rest_smaller_than_a_batch(
    lengths: list[int], batch_size: int, seed: int
) -> None:
    batches = grouped_by_length(lengths, batch_size, seed)
    assert len(batches) == len(lengths) // batch_size
    assert all(len(batch) == batch_size for batch in batches)
    seen = [index for batch in batches for index in batch]
    assert len({*seen}) == len(seen) and {*seen} <= {*range(len(lengths))}
    assert batches == grouped_by_length(lengths, batch_size, seed)


def test_epochs_differ_in_order_neighbours_and_rest() -> None:
    first, second = (grouped_by_length(LENGTHS, 32, seed) for seed in (1, 2))
    assert {*range(5_003)} - {i for b in first for i in b} != {*range(5_003)} - {i for b in second for i in b}
    assert not {frozenset(batch) for batch in first} & {frozenset(batch) for batch in second}
    longest = [max(LENGTHS[i] for i in batch) for batch in first]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


def test_padding_is_what_a_batch_holds_beyond_its_conversations() -> None:
    assert padding_share([[0, 1], [2]], [10, 30, 16], 16) == pytest.approx(1 - 56 / 80)


def test_genuine_threads_need_a_fraction_of_the_padding(shared_data: Path, llama2_model: Path, tmp_path: Path) -> None:
    accounting = Accounting.beside(tmp_path / "out")
    trees = shared_data / "oasst1-en-validation" / "trees.jsonl.gz"
    preprocess(trees, tmp_path / "out", split_ratio=1, seed=10, options=Options(), trees=accounting)
    tokenizer = SentencePieceTokenizer(llama2_model)
    lengths = [
        len(ChatTemplate().render(Conversation.from_record(record, ref), tokenizer).token_ids)
        for ref, record in read_records(tmp_path / "out_train.jsonl")
    ]
    shuffled = np.random.default_rng(0).permutation(len(lengths)).tolist()
    random_batches = [shuffled[i : i + 16] for i in range(0, len(shuffled) - 15, 16)]
    before = padding_share(random_batches, lengths, 16)
    after = padding_share(grouped_by_length(lengths, 16, 1234), lengths, 16)
    assert before > 0.4
    assert after < before / 2


@pytest.fixture(scope="module")
def sampler() -> Any:
    pytest.importorskip("nemo_aligner", reason="needs the training stack: nemo_toolkit, megatron-core, nemo-aligner")
    from steerlm_nemo.compat import prepare

    prepare()
    from steerlm_nemo.training.loaders import LengthGroupedSampler

    def make(consumed_samples: int = 0, rank: int = 0, size: int = 1) -> Any:
        return LengthGroupedSampler(
            LENGTHS,
            consumed_samples=consumed_samples,
            micro_batch_size=4,
            global_batch_size=32,
            data_parallel_rank=rank,
            data_parallel_size=size,
            drop_last=True,
            seed=1234,
        )

    return make


def test_a_resumed_sampler_goes_on_where_it_stopped(sampler: Any) -> None:
    per_epoch = 5_003 // 32
    whole = sampler()
    epochs = [list(whole), list(whole)]
    assert len(epochs[0]) == len(epochs[1]) == per_epoch
    assert epochs[0] != epochs[1]
    for epoch, step in ((0, 1), (0, per_epoch - 1), (1, 0), (1, 77)):
        resumed = sampler(consumed_samples=(epoch * per_epoch + step) * 32)
        assert len(resumed) == per_epoch - step
        assert list(resumed) == epochs[epoch][step:]


def test_ranks_share_each_global_batch_evenly(sampler: Any) -> None:
    one = list(sampler())
    ranks = [list(sampler(rank=rank, size=4)) for rank in range(4)]
    for batch, *shares in zip(one, *ranks, strict=True):
        assert sorted(index for share in shares for index in share) == sorted(batch)
        assert {len(share) for share in shares} == {8}
        longest = sorted(max(LENGTHS[index] for index in share) for share in shares)
        spread = max(LENGTHS[index] for index in batch) - min(LENGTHS[index] for index in batch)
        assert longest[-1] - longest[0] <= spread
