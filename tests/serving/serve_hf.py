"""`python serve_hf.py FOLDER PORT`: a tiny model of the tests behind the real API, in a process of its own."""

import json
import sys
from pathlib import Path

import torch
from hf_engine import HFEngine

from steerlm_nemo.errors import exit_with_message
from steerlm_nemo.serving.api import build_app
from steerlm_nemo.serving.server import open_listener, serve
from steerlm_nemo.template import SteerLMFormat


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    listener = open_listener(port)
    torch.set_num_threads(1)
    served = SteerLMFormat.from_dict(json.loads((folder / "format.json").read_text()))
    engine = HFEngine.load(folder, served)
    serve(build_app(engine), listener, engine.info.name)


if __name__ == "__main__":
    exit_with_message(main)
