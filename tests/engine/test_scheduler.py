"""The scheduler and the cache with a model that is a pure function of the tokens it has seen.

Every place of the cache remembers which tokens its keys and values stand for, so a place that is shared, given back or
evicted wrongly shows at once, and so does a token that is computed on a wrong guess and stays.
"""

from __future__ import annotations

import random
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from steerlm_nemo.engine.cache import KVCache
from steerlm_nemo.engine.protocol import Completion, Finished, Sample
from steerlm_nemo.engine.scheduler import Scheduler

VOCAB, CONTEXT = 40, 96
KEY = ((30, 31),)
DIGITS = tuple((20 + value, 35) for value in range(5))
WIDE = ((21, 35), (21, 20, 35), (22, 35), (22, 20, 35))  # 1, 10, 2, 20: told apart by their second token
LINE = (KEY, DIGITS, KEY, DIGITS, KEY, WIDE, KEY, DIGITS, ((36,),))


class Model:
    """Pseudo-random logits of the prefix; `likes(prefix)` is added to them."""

    def __init__(self, likes=lambda prefix: {}):
        self.likes = likes
        self.table = np.zeros((64, CONTEXT), np.int64)
        self.stands_for: dict[int, tuple[int, ...]] = {}  # place -> the token and those before it
        self.rows = np.random.default_rng(0).normal(size=(997, VOCAB)).astype(np.float32)

    def logits_after(self, prefix):
        row = self.rows[zlib.crc32(bytes(prefix)) % len(self.rows)].copy()
        for token, bonus in self.likes(prefix).items():
            row[token] += bonus
        return row

    def run(self, plan):
        self.table[plan.table[0], plan.table[1]] = plan.table[2]
        wanted, found, start = set(plan.wanted.tolist()), [], 0
        for line, num_new, total in zip(plan.lines, plan.num_new, plan.totals, strict=True):
            held = [self.stands_for[place] for place in self.table[line, : total - num_new].tolist()]
            prefix = held[-1] if held else ()
            assert held == [prefix[: n + 1] for n in range(total - num_new)]
            for n in range(start, start + num_new):
                prefix = (*prefix, int(plan.tokens[n]))
                self.stands_for[int(plan.places[n])] = prefix
                if n in wanted:
                    found.append(self.logits_after(prefix))
            start += num_new
        return torch.from_numpy(np.array(found, np.float32).reshape(-1, VOCAB))


def scheduler(num_places=4000, max_rows=8, max_step_tokens=64):
    info = SimpleNamespace(vocab_size=VOCAB, tokenizer=SimpleNamespace(eos_id=1))
    return Scheduler(KVCache(4 * max_rows, num_places, CONTEXT), info, max_rows, max_step_tokens, prefix_reuse=True)


def run(planner, model, samples) -> list[Completion]:
    rows = {planner.add(sample): place for place, sample in enumerate(samples)}
    done: dict[int, Completion] = {}
    while (plan := planner.plan()) is not None:
        for event in planner.take(model.run(plan)):
            if isinstance(event, Finished):
                done[rows[event.row]] = event.completion
    return [done[place] for place in range(len(samples))]


def expected_line(model, prompt, constraint):
    """The line by its definition: step by step, the likeliest permitted token. And the values that overrule."""
    ids, num_overruled = list(prompt), 0
    for options in constraint:
        taken = ()
        while taken not in options:
            permitted = sorted({o[len(taken)] for o in options if o[: len(taken)] == taken})
            if len(permitted) > 1:
                logits = model.logits_after(tuple(ids))
                num_overruled += int(logits.argmax()) not in permitted
                token = max(permitted, key=lambda t: logits[t])
            else:
                token = permitted[0]
            taken += (token,)
            ids.append(token)
    return tuple(ids), num_overruled


def prompts(count, chance):
    beginnings = [tuple(chance.choices(range(2, 20), k=chance.randint(1, 20))) for _ in range(4)]
    return [(*chance.choice(beginnings), *chance.choices(range(2, 20), k=chance.randint(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("num_places", [100, 4000], ids=["a cache for one row", "a large cache"])
@pytest.mark.parametrize("max_step_tokens", [5, 200])
@pytest.mark.parametrize("bonus", [0.0, 2.0, 9.0], ids=["guesses fail", "guesses hold now and then", "guesses hold"])
def test_a_line_is_the_models_own_whatever_rows_before_it_chose(num_places, max_step_tokens, bonus):
    model = Model(lambda prefix: {22: bonus, 20: bonus / 2})
    samples = [Sample(prompt, 24, greedy=True, constraint=LINE) for prompt in prompts(40, random.Random(5))]
    done = run(scheduler(num_places, max_step_tokens=max_step_tokens), model, samples)
    for sample, completion in zip(samples, done, strict=True):
        ids, num_overruled = expected_line(model, sample.prompt_ids, LINE)
        assert (completion.token_ids, completion.num_overruled) == (ids, num_overruled)
        assert completion.finish_reason == "stop"
        assert [len(choice.logprobs) for choice in completion.choices] == [5, 5, 4, 5]


def test_values_that_rows_keep_choosing_cost_no_forward_pass_each():
    model = Model(lambda prefix: {22: 40.0, 35: 30.0})
    planner = scheduler()
    for prompt in prompts(30, random.Random(6)):  # one at a time
        run(planner, model, [Sample(prompt, 24, greedy=True, constraint=LINE)])
    before = planner.counters.steps
    run(planner, model, [Sample((7, 7, 7), 24, greedy=True, constraint=LINE)])
    assert planner.counters.steps - before == 1  # the prompt, and four values on trial


def test_what_was_computed_on_a_wrong_guess_is_given_back():
    model = Model(lambda prefix: {22: 30.0} if prefix[0] != 9 else {23: 30.0, 21: 20.0})
    planner = scheduler(num_places=CONTEXT)  # a place lost would leave no room
    for number in range(60):
        prompt = (9 if number % 10 == 9 else 8, *range(2, 2 + number % 12))
        (done,) = run(planner, model, [Sample(prompt, 24, greedy=True, constraint=LINE)])
        assert done.token_ids == expected_line(model, prompt, LINE)[0]


def test_free_rows_and_constrained_rows_share_steps_and_places():
    model = Model()
    chance = random.Random(8)
    samples = [
        Sample(prompt, 24 if number % 2 else chance.randint(1, 30), greedy=True, constraint=LINE if number % 2 else ())
        for number, prompt in enumerate(prompts(60, chance))
    ]
    for sample, completion in zip(samples, run(scheduler(300), model, samples), strict=True):
        if sample.constraint:
            assert completion.token_ids == expected_line(model, sample.prompt_ids, LINE)[0]
            continue
        ids = sample.prompt_ids
        for _ in range(sample.tokens_to_generate):
            ids = (*ids, int(model.logits_after(ids).argmax()))
        assert completion.token_ids == ids and completion.finish_reason == "length"
