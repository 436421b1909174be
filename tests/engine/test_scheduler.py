"""The scheduler and the cache with a model that is a pure function of the tokens it has seen.

Every place of the cache remembers which tokens its keys and values stand for, so a place that is shared, given back or
evicted wrongly shows at once, and so does a token that is computed on a wrong guess and stays.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from steerlm_nemo.engine.cache import KVCache
from steerlm_nemo.engine.protocol import Failed, Finished, Sample, Scored, ScoreRequest
from steerlm_nemo.engine.scheduler import LogitsError, Scheduler

VOCAB, CONTEXT = 40, 96
KEY = ((30, 31),)
DIGITS = tuple((20 + value, 35) for value in range(5))
WIDE = ((21, 35), (21, 20, 35), (22, 35), (22, 20, 35))  # 1, 10, 2, 20: told apart by their second token
LINE = (KEY, DIGITS, KEY, DIGITS, KEY, WIDE, KEY, DIGITS, ((36,),))


class Model:
    """Pseudo-random logits of the prefix; `likes(prefix)` is added to them."""

    def __init__(self, likes=lambda prefix: {}):
        self.likes = likes
        self.table = np.zeros((256, CONTEXT), np.int64)
        self.stands_for: dict[int, tuple[int, ...]] = {}  # place -> the token and those before it
        self.rows = np.random.default_rng(0).normal(size=(997, VOCAB)).astype(np.float32)

    def logits_after(self, prefix):
        row = self.rows[zlib.crc32(bytes(prefix)) % len(self.rows)].copy()
        for token, bonus in self.likes(prefix).items():
            row[token] += bonus
        return row

    def run(self, plan):
        """Rows that look at places of this step come after those that fill them: in a layer, all are filled first."""
        self.table[plan.table[0], plan.table[1]] = plan.table[2]
        to_fill, logits = set(plan.places.tolist()), {}
        starts = np.cumsum(plan.num_new) - plan.num_new
        rows = list(zip(plan.lines, starts, plan.num_new, plan.totals, strict=True))
        while rows:
            ready = [row for row in rows if not to_fill & set(self.table[row[0], : row[3] - row[2]].tolist())]
            assert ready, "rows wait for each other in a circle"
            rows = [row for row in rows if row not in ready]
            for line, start, num_new, total in ready:
                held = [self.stands_for[place] for place in self.table[line, : total - num_new].tolist()]
                prefix = held[-1] if held else ()
                assert held == [prefix[: n + 1] for n in range(total - num_new)]
                for n in range(start, start + num_new):
                    prefix = (*prefix, int(plan.tokens[n]))
                    assert int(plan.positions[n]) == len(prefix) - 1
                    self.stands_for[int(plan.places[n])] = prefix
                    to_fill.remove(int(plan.places[n]))
                    logits[n] = self.logits_after(prefix)
        found = [logits[n] for n in plan.wanted.tolist()]
        return torch.from_numpy(np.array(found, np.float32).reshape(-1, VOCAB))


def scheduler(num_places=4000, max_rows=8, max_step_tokens=64, prefix_reuse=True):
    info = SimpleNamespace(vocab_size=VOCAB, tokenizer=SimpleNamespace(eos_id=1))
    return Scheduler(KVCache(4 * max_rows, num_places, CONTEXT), info, max_rows, max_step_tokens, prefix_reuse)


def run(planner, model, work) -> list:
    """The completion or the scores of each piece of work; of one that fails, the error."""
    rows = {planner.add(item): place for place, item in enumerate(work)}
    done: dict[int, object] = {}
    while (plan := planner.plan()) is not None:
        for event in planner.take(model.run(plan)):
            if isinstance(event, Finished):
                done[rows[event.row]] = event.completion
            elif isinstance(event, Scored):
                done[rows[event.row]] = event.scores
            elif isinstance(event, Failed):
                done[rows[event.row]] = event.error
    return [done[place] for place in range(len(work))]


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


def expected_logprobs(model, ids, first):
    """Log-probabilities of ids[first:] by their definition."""
    logprobs = []
    for n in range(first, len(ids)):
        logits = model.logits_after(tuple(ids[:n])).astype(np.float64)
        logprobs.append(logits[ids[n]] - np.log(np.exp(logits).sum()))
    return logprobs


def expected_scores(model, request):
    num_prompt = len(request.prompt_ids)
    return [
        pytest.approx(expected_logprobs(model, request.prompt_ids + span, num_prompt), abs=1e-5)
        for span in request.spans
    ]


def score_requests(count, chance):
    """Spans of any length, some equal, some beginning alike, one token long or longer than a step."""
    made = []
    for prompt in prompts(count, chance):
        spans = [
            tuple(chance.choices(range(2, 20), k=chance.choice((1, 2, 7, 40)))) for _ in range(chance.randint(1, 12))
        ]
        made.append(ScoreRequest(prompt, (*spans, spans[0], spans[0][:3])))
    return made


def prompts(count, chance):
    beginnings = [tuple(chance.choices(range(2, 20), k=chance.randint(1, 20))) for _ in range(4)]
    return [(*chance.choice(beginnings), *chance.choices(range(2, 20), k=chance.randint(1, 30))) for _ in range(count)]


@pytest.mark.parametrize("num_places", [100, 4000], ids=["a cache for one row", "a large cache"])
@pytest.mark.parametrize("max_step_tokens", [5, 12, 20, 200])
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


@pytest.mark.parametrize("max_step_tokens", [24, 40, 90])
def test_a_row_that_guessed_wrong_while_others_take_the_room_goes_on_from_what_it_chose(max_step_tokens):
    """What it was led to believe must not be fed again with the first of its pending tokens."""
    model = Model(lambda prefix: {23 if zlib.crc32(bytes(prefix)) % 20 == 0 else 22: 30.0, 20: 20.0})
    line = LINE[:-1] * 2 + LINE[-1:]
    samples = [Sample(prompt, 40, greedy=True, constraint=line) for prompt in prompts(200, random.Random(7))]
    done = run(scheduler(max_rows=40, max_step_tokens=max_step_tokens), model, samples)
    for sample, completion in zip(samples, done, strict=True):
        assert completion.token_ids == expected_line(model, sample.prompt_ids, line)[0]


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


@pytest.mark.parametrize("num_places", [100, 4000], ids=["a cache for one row", "a large cache"])
@pytest.mark.parametrize("max_step_tokens", [5, 200])
@pytest.mark.parametrize("prefix_reuse", [True, False])
def test_spans_are_scored_exactly_beside_rows_that_generate_and_leave_those_as_they_are(
    num_places, max_step_tokens, prefix_reuse
):
    model = Model()
    chance = random.Random(9)
    requests = score_requests(12, chance)
    lines = [Sample(prompt, 24, greedy=True, constraint=LINE) for prompt in prompts(6, chance)]
    free = [Sample(prompt, 9, greedy=True) for prompt in prompts(6, chance)]
    work = [*requests, *lines, *free]
    order = chance.sample(range(len(work)), len(work))
    planner = scheduler(num_places, max_step_tokens=max_step_tokens, prefix_reuse=prefix_reuse)
    found = dict(zip(order, run(planner, model, [work[place] for place in order]), strict=True))
    for place, request in enumerate(requests):
        scores = found[place]
        assert list(scores.token_logprobs) == expected_scores(model, request)
        assert scores.logprobs == pytest.approx([sum(span) for span in scores.token_logprobs])
    for place, sample in enumerate(lines, len(requests)):
        assert found[place].token_ids == expected_line(model, sample.prompt_ids, LINE)[0]
    for place, sample in enumerate(free, len(requests) + len(lines)):
        ids = sample.prompt_ids
        for _ in range(sample.tokens_to_generate):
            ids = (*ids, int(model.logits_after(ids).argmax()))
        assert found[place].token_ids == ids


def test_a_prompt_and_all_spans_after_it_are_one_pass_that_computes_nothing_twice():
    model, planner = Model(), scheduler(max_rows=64, max_step_tokens=1000)
    spans = ((5, 6, 7), (5, 6, 8, 9), (4,), (4, 3), (5, 6, 7), (10, 11, 12, 13))
    planner.add(ScoreRequest(tuple(range(2, 20)), spans))
    plan = planner.plan()
    # What is after the last token of a span is not asked: 18 of the prompt, 5 6, then 8, 4, and 10 11 12.
    assert len(plan.tokens) == 18 + 2 + 1 + 1 + 3
    (event,) = planner.take(model.run(plan))
    assert [len(span) for span in event.scores.token_logprobs] == [len(span) for span in spans]
    assert planner.plan() is None


def test_many_rows_of_one_prompt_compute_it_once():
    model, planner = Model(), scheduler(max_rows=64, max_step_tokens=1000)
    prompt = tuple(range(2, 20))
    for _ in range(8):
        planner.add(Sample(prompt, 4, greedy=True))
    assert len(planner.plan().tokens) == len(prompt)
    planner = scheduler(max_rows=64, max_step_tokens=1000)
    first, *others = run(planner, model, [Sample(prompt, 4, greedy=True)] * 8)
    assert all(completion == first for completion in others)


@pytest.mark.parametrize("max_step_tokens", [7, 1000])
def test_log_probabilities_of_prompts_that_begin_alike_are_computed_once(max_step_tokens):
    model, planner = Model(), scheduler(max_step_tokens=max_step_tokens)
    beginning = tuple(random.Random(3).choices(range(2, 20), k=40))
    texts = [(*beginning, *end) for end in ((3, 30), (4, 30), (5, 30), (5, 31), (6, 7, 8))]

    def check():
        samples = [Sample(text, 3, greedy=True, compute_logprob=True) for text in texts]
        for sample, completion in zip(samples, run(planner, model, samples), strict=True):
            assert completion.token_ids[:-3] == sample.prompt_ids
            assert completion.logprob == pytest.approx(expected_logprobs(model, completion.token_ids, 1), abs=1e-5)

    check()
    assert planner.counters.prefilled_tokens < 40 + 5 * 6  # a step or two behind, a token or two are computed again
    before = planner.counters.prefilled_tokens
    check()  # now all is remembered, but what comes after the prompts
    assert planner.counters.prefilled_tokens - before <= len(texts)


def test_whole_distributions_are_not_taken_from_memory():
    model, planner = Model(), scheduler()
    prompt = tuple(range(2, 20))
    run(planner, model, [Sample(prompt, 3, greedy=True, compute_logprob=True)])
    (done,) = run(planner, model, [Sample(prompt, 3, greedy=True, all_probs=True)])
    assert len(done.full_logprob) == len(prompt) + 2
    for n, row in enumerate(done.full_logprob):
        logits = model.logits_after(done.token_ids[: n + 1])
        assert row == pytest.approx((logits - np.log(np.exp(logits).sum())).tolist(), abs=1e-5)


@pytest.mark.parametrize("max_step_tokens", [5, 200])
@pytest.mark.parametrize("num_tokens", [0, 1, 4])
def test_a_prompt_is_scored_with_what_comes_after_it_and_the_likeliest_tokens_of_every_place(
    max_step_tokens, num_tokens
):
    model, planner = Model(), scheduler(max_step_tokens=max_step_tokens)
    chance = random.Random(12)
    texts = [*prompts(6, chance), (7,), tuple(chance.choices(range(2, 20), k=CONTEXT - num_tokens))]
    samples = [
        Sample(text, num_tokens, greedy=True, token_logprobs=True, top_logprobs=2, prompt_logprobs=True)
        for text in texts
    ]
    for _ in range(2):  # now with all that is remembered
        for sample, completion in zip(samples, run(planner, model, samples), strict=True):
            ids = completion.token_ids
            assert (len(ids), completion.finish_reason) == (len(sample.prompt_ids) + num_tokens, "length")
            assert list(completion.token_logprobs) == pytest.approx(expected_logprobs(model, ids, 1), abs=1e-5)
            assert len(completion.top_logprobs) == len(ids) - 1
            for n, (best, logprob) in enumerate(
                zip(completion.top_logprobs, completion.token_logprobs, strict=True), 1
            ):
                order = np.argsort(-model.logits_after(ids[:n]))
                assert [token for token, _ in best] == order[:2].tolist()
                # To the last bit: by this, clients tell whether a token is what greedy would have taken.
                assert (logprob == best[0][1]) == (ids[n] == order[0])


def made(model, sample):
    """The tokens made, one by one, and what is said of the last one."""
    planner = scheduler()
    planner.add(sample)
    events = []
    while (plan := planner.plan()) is not None:
        events += planner.take(model.run(plan))
    *tokens, finished = events
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert tokens[-1].finish_reason == finished.completion.finish_reason
    return [token.token_id for token in tokens], tokens[-1].finish_reason


def test_the_last_token_of_a_row_says_how_it_ends():
    model = Model(lambda prefix: {9: 50.0 if len(prefix) > 5 else 0.0})
    assert made(model, Sample((3, 4, 5), 2, greedy=True))[1] == "length"
    tokens, finish_reason = made(model, Sample((3, 4, 5), 20, greedy=True, stop_ids=(9,)))
    assert (tokens[-1], len(tokens), finish_reason) == (9, 4, "stop")


@pytest.mark.parametrize("greedy", [True, False])
def test_stops_that_wait_cannot_come_before_the_least_number_of_tokens(greedy):
    model = Model(lambda prefix: {9: 50.0, 1: 40.0})
    common = {"greedy": greedy, "stop_ids": (1, 9), "random_seed": 4}
    assert made(model, Sample((3, 4), 20, **common))[0] == [9]
    assert made(model, Sample((3, 4), 20, min_tokens_to_generate=6, **common))[0] == [9]  # eos alone waits
    tokens, finish_reason = made(model, Sample((3, 4), 20, min_tokens_to_generate=6, stops_wait=True, **common))
    assert (len(tokens), tokens[-1], finish_reason) == (7, 9, "stop")
    assert not {1, 9} & set(tokens[:-1])


def test_eos_that_is_no_stop_is_a_token_like_others():
    assert made(Model(lambda prefix: {1: 50.0}), Sample((3, 4), 7, greedy=True)) == ([1] * 7, "length")


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({}, [9, 9, 9, 9, 9, 9]),
        ({"logit_bias": ((8, 30.0), (7, 80.0))}, [7, 7, 7, 7, 7, 7]),
        ({"logit_bias": ((9, -100.0),)}, [8, 8, 8, 8, 8, 8]),
        ({"frequency_penalty": 9.0}, [9, 9, 8, 9, 8, 9]),  # 60 and 46.5, less 9 for every time
        ({"presence_penalty": 30.0}, [9, 8, 9, 9, 9, 9]),
        ({"repetition_penalty": 1.2}, [9, 9, 9, 9, 9, 9]),
        ({"repetition_penalty": 2.0}, [9, 8, 9, 9, 9, 9]),
    ],
)
def test_rules_change_which_token_is_the_likeliest(rule, expected):
    """The prompt has none of them: penalties of OpenAI count generated tokens only."""
    model = Model(lambda prefix: {9: 60.0, 8: 46.5})
    model.rows[:] = 0
    assert made(model, Sample((3, 4), 6, top_k=1, **rule))[0] == expected


def test_tokens_less_likely_than_min_p_of_the_likeliest_are_never_drawn():
    model = Model(lambda prefix: {9: 3.0, 8: 2.0, 7: 1.0})  # e^-1 and e^-2 of the likeliest
    model.rows[:] = 0

    def drawn(**settings):
        return set(made(model, Sample((3, 4), 90, top_p=1.0, random_seed=1, **settings))[0])

    assert drawn(min_p=0.2) == {9, 8}
    assert drawn(min_p=0.1) == {9, 8, 7}
    assert drawn(min_p=1.0) == {9}
    assert len(drawn()) > 3
    assert drawn(min_p=0.3) == {9, 8} and drawn(min_p=0.3, temperature=2.0) == {9, 8, 7}  # of what is tempered


def test_a_cancelled_request_gives_everything_back():
    model, planner = Model(), scheduler(num_places=CONTEXT, max_rows=4, max_step_tokens=16)
    prompt = tuple(range(2, 20))
    for steps in range(1, 12):
        doomed = planner.add(ScoreRequest(prompt, tuple((token,) * 60 for token in range(2, 12))))
        for _ in range(steps):
            assert not planner.take(model.run(planner.plan()))
        planner.cancel(doomed)
        assert planner.plan() is None
    (request,) = score_requests(1, random.Random(2))
    (scores,) = run(planner, model, [request])
    assert list(scores.token_logprobs) == expected_scores(model, request)


def test_logits_that_are_no_numbers_fail_the_request_they_concern_and_no_other():
    model = Model(lambda prefix: {0: np.nan} if prefix[0] == 3 and len(prefix) > 6 else {})
    sick = ScoreRequest((3, 4, 5, 6), ((7,), (7, 8, 9, 10), (5, 6, 7, 8)))
    well = ScoreRequest((4, 4, 5, 6), sick.spans)
    failed, scores, again = run(
        scheduler(max_step_tokens=12), model, [sick, well, ScoreRequest(sick.prompt_ids, ((7,),))]
    )
    assert isinstance(failed, LogitsError)
    assert list(scores.token_logprobs) == expected_scores(model, well)
    assert len(again.token_logprobs) == 1


@pytest.mark.parametrize("fault", ["one token too many is taken over", "logits of a neighbour"])
def test_what_these_tests_claim_would_show(fault, monkeypatch):
    longest_prefix = KVCache.longest_prefix

    def one_too_many(cache, ids, first_wanted, **asked):
        prefix = longest_prefix(cache, ids, first_wanted, **asked)
        return replace(prefix, length=prefix.length + 1) if 0 < prefix.length < len(ids) - 1 else prefix

    class Shifted(Model):
        def run(self, plan):
            return super().run(plan).roll(1, 0)

    if fault == "one token too many is taken over":
        monkeypatch.setattr(KVCache, "longest_prefix", one_too_many)
    model = Shifted() if fault == "logits of a neighbour" else Model()
    with pytest.raises((AssertionError, KeyError)):
        for request in score_requests(6, random.Random(9)):
            (scores,) = run(scheduler(), model, [request])
            assert list(scores.token_logprobs) == expected_scores(model, request)
