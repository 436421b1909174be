"""guidellm: a short load, and what it measured."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from programs_of_clients import Server, client_environment

CLIENT = "guidellm"
NUM_REQUESTS, PROMPT, OUTPUT = 6, 20, 17


@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/completions"])
def test_every_request_gets_exactly_the_tokens_it_asked_for(
    python_of: Callable[[str], Path], plain: Server, tmp_path: Path, route: str
) -> None:
    report = tmp_path / "report.json"
    command = [str(python_of(CLIENT).with_name("guidellm")), "run", "--disable-console"]
    command += ["--backend", f"kind=openai_http,target={plain.url},request_format={route},http2=false"]
    command += ["--tokenizer", f"kind=huggingface_auto,model={plain.folder}", "--profile", "kind=concurrent,streams=2"]
    command += ["--data", f"kind=synthetic_text,prompt_tokens={PROMPT},output_tokens={OUTPUT}"]
    command += ["--constraint", f"kind=max_requests,count={NUM_REQUESTS}", "--output", f"kind=json,path={report}"]
    env = {**client_environment(), "HF_HOME": str(tmp_path / "home")}
    ended = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert not requests["errored"] and len(requests["successful"]) == NUM_REQUESTS
    for request in requests["successful"]:
        assert request["output_metrics"]["text_tokens"] == OUTPUT
