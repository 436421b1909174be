"""`python serve_hf.py FOLDER PORT [PAUSE_S]`: a tiny model of the tests behind the real API, in a process of its own.

PAUSE_S is what each step of the engine waits, so that there is time to do something to the server meanwhile.
"""

import json
import os
import sys
import time
from pathlib import Path

import live
import torch
from hf_engine import HFEngine

from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.model_kind import SteerLMFormat
from steerlm_nemo.serving.listener import open_listener, serve


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    pause_s = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    http = live.http(token=os.environ.get("STEERLM_TOKEN"))
    listener = open_listener(port)
    torch.set_num_threads(1)
    served = SteerLMFormat.from_dict(json.loads((folder / "format.json").read_text()))
    engine = HFEngine.load(folder, served)
    if pause_s:
        step = engine.step
        engine.step = lambda: (time.sleep(pause_s), step())[1]  # type: ignore[method-assign]
    serve(live.app(engine, http=http), listener, engine.info.name, http.drain_s)


if __name__ == "__main__":
    exit_with_message(main)
