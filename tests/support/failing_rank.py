"""One rank of an engine whose model fails on one rank in the middle of the work: failing_rank.py MODEL.nemo RANK"""

from __future__ import annotations

import os
import sys

from steerlm_nemo.engine.megatron import EngineSettings, MegatronEngine, RankLostError
from steerlm_nemo.engine.protocol import Sample, complete
from steerlm_nemo.models.loading import load_for_inference
from steerlm_nemo.ranks import EXIT_RANK_FAILED


def main() -> None:
    model_path, failing_rank = sys.argv[1:]
    loaded = load_for_inference(model_path, int(os.environ["WORLD_SIZE"]), "32")
    engine = MegatronEngine(loaded, "model", EngineSettings(8, 64, 0.01, True))
    if os.environ["RANK"] == failing_rank:
        layer = loaded.nemo_model.model.decoder.layers[1]
        calls = []

        def fail(module: object, args: object, kwargs: object) -> None:
            calls.append(module)
            if len(calls) == 5:
                raise RuntimeError("out of memory, say")

        layer.register_forward_pre_hook(fail, with_kwargs=True)
    if os.environ["RANK"] != "0":
        engine.follow()
        return
    samples = [Sample((1, 300 + number), 20, greedy=True) for number in range(4)]
    try:
        complete(engine, samples)
    except RankLostError:
        os._exit(EXIT_RANK_FAILED)
    except RuntimeError as err:
        print(f"given up: {err}; then {len(complete(engine, samples))} rows completed")
    engine.close()


if __name__ == "__main__":
    main()
