"""Whatever comes, a server answers, and with a reason. STEERLM_FUZZ_REQUESTS=10000 makes it the long run."""

import os

import fuzz
import pytest

NUM_REQUESTS = int(os.environ.get("STEERLM_FUZZ_REQUESTS", "400"))


@pytest.mark.slow
@pytest.mark.parametrize("model", fuzz.MODELS)
def test_random_requests_get_an_answer_or_a_reason_and_never_a_5xx(model):
    findings, log = fuzz.fuzz(model, NUM_REQUESTS // 2, seed=NUM_REQUESTS)
    assert not findings.bad, "\n".join(findings.bad[:5])
    assert findings.statuses[200] > NUM_REQUESTS // 20 and findings.statuses[400] > NUM_REQUESTS // 20
    assert "dry hello" not in log  # no bodies
