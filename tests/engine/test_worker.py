"""The thread between the API and an engine, on the Hugging Face engine of the tests."""

import threading
import time

import live
import pytest

from steerlm_nemo.engine.protocol import Sample, ScoreRequest, score
from steerlm_nemo.engine.watch import Patience
from steerlm_nemo.engine.worker import EngineDiedError, EngineWorker
from steerlm_nemo.errors import InputError

PATIENCE = Patience(stall_s=120, give_up_s=300)


@pytest.fixture
def engine():
    return live.engine(None)


@pytest.fixture
def worker(engine):
    worker = EngineWorker(engine, max_batch_rows=3, max_waiting_requests=8, patience=PATIENCE)
    worker.start()
    yield worker
    worker.stop()


def sample(first_id, count, **settings):
    return Sample((first_id,), count, greedy=True, **settings)


def test_tokens_are_told_as_they_are_made_and_completions_come_in_the_order_of_the_samples(worker):
    told = {0: [], 1: [], 2: [], 3: []}
    samples = [sample(300 + number, 5 - number) for number in range(4)]  # more rows than run at a time
    done = worker.submit(samples, lambda row, token: told[row].append(token.token_id)).result(60)
    assert [completion.token_ids[0] for completion in done] == [300, 301, 302, 303]
    assert [list(completion.token_ids[1:]) for completion in done] == list(told.values())


def test_scores_come_in_the_order_of_the_requests_beside_rows_that_generate(worker, engine):
    requests = [ScoreRequest((300 + n, 5), ((7, 8), (9,), tuple(range(3, 40)))) for n in range(5)]
    tokens = worker.submit([sample(300, 12)])
    scores = worker.score(requests).result(60)
    assert len(tokens.result(60)[0].token_ids) == 13
    assert [[len(span) for span in found.token_logprobs] for found in scores] == [[2, 1, 37]] * 5
    assert scores == score(engine, requests)  # now nobody else uses it
    assert len(set(scores)) == 5


@pytest.mark.parametrize(
    ("prompt", "spans", "reason"),
    [
        ((), ((3,),), "a token at least"),
        ((3,), (), "there must be a span"),
        ((3,), ((4,), ()), "a token at least"),
        ((3,), ((4,), (5,) * 256), "request 1: prompt and span have 257 tokens, but the model's context is 256"),
    ],
)
def test_what_cannot_be_scored_is_refused_before_the_engine_hears_of_it(engine, prompt, spans, reason):
    with pytest.raises(InputError, match=reason):
        score(engine, [ScoreRequest((3,), ((4,),)), ScoreRequest(prompt, spans)])


def test_cancelling_frees_running_rows_before_the_next_step(worker, engine):
    started, tokens = threading.Event(), []
    future = worker.submit([sample(300, 200)] * 3, lambda row, token: (tokens.append(token), started.set()))
    assert started.wait(60)
    assert worker.num_running == 3
    assert future.cancel()
    assert len(worker.submit([sample(301, 2)]).result(60)) == 1  # there is room again
    made = len(tokens)
    assert made < 600
    time.sleep(0.2)
    assert len(tokens) == made and worker.num_running == 0


def test_an_engine_that_dies_is_told_to_everybody_who_waits_and_to_whoever_comes_later(engine):
    class Dying:
        info, counters = engine.info, engine.counters
        add, cancel = staticmethod(engine.add), staticmethod(engine.cancel)

        def step(self):
            raise RuntimeError("no more")

    worker = EngineWorker(Dying(), max_batch_rows=1, max_waiting_requests=8, patience=PATIENCE)
    futures = [worker.submit([sample(300, 2)]) for _ in range(3)]
    worker.start()
    for future in futures:
        with pytest.raises(EngineDiedError, match="no more"):
            future.result(60)
    assert str(worker.failed) == "no more"
    with pytest.raises(EngineDiedError):
        worker.submit([sample(300, 2)])
    worker.stop()
