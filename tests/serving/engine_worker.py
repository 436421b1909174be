"""One rank: the same prompts through our engine and through NeMo's own `generate`, results to a JSON file.

engine_worker.py MODEL.nemo PROMPTS.json RESULTS.json
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from steerlm_nemo.serving.engine import MegatronEngine
from steerlm_nemo.serving.loading import load_for_inference
from steerlm_nemo.serving.sampling import Sample


def main() -> None:
    import torch

    model_path, prompts_path, results_path = sys.argv[1:]
    prompts, tokens_to_generate = json.loads(Path(prompts_path).read_text())
    loaded = load_for_inference(model_path, int(os.environ["WORLD_SIZE"]), "32")
    ours = _ours(MegatronEngine(loaded, "model"), prompts, tokens_to_generate)
    theirs = []
    # One at a time: NeMo gives the shorter prompts of a batch more tokens than asked for (D-16).
    for prompt in prompts:
        theirs.append(_nemo(loaded, torch.tensor([prompt]), tokens_to_generate))
    if os.environ["RANK"] == "0":
        Path(results_path).write_text(json.dumps({"ours": ours, "theirs": theirs}))


def _ours(engine: MegatronEngine, prompts: list[list[int]], tokens_to_generate: int) -> dict[str, object] | None:
    if os.environ["RANK"] != "0":
        engine.follow()
        return None
    eos = (engine.info.tokenizer.eos_id,)

    def sample(prompt: list[int], **settings: object) -> Sample:
        return Sample(tuple(prompt), tokens_to_generate, stop_ids=eos, **settings)  # type: ignore[arg-type]

    greedy = [sample(prompt, greedy=True, compute_logprob=True) for prompt in prompts]
    drawn = [sample(prompt, random_seed=7, top_k=20, top_p=0.95) for prompt in prompts]
    results: dict[str, object] = {
        "together": [done.token_ids for done in engine.generate(greedy)],
        "logprob": [done.logprob for done in engine.generate(greedy)],
        "alone": [engine.generate([one])[0].token_ids for one in greedy],
        # Beside other rows, with other settings, in another order.
        "mixed": [done.token_ids for done in engine.generate([*reversed(greedy), *drawn])][: len(greedy)][::-1],
        "drawn": [done.token_ids for done in engine.generate(drawn)],
        "drawn again": [done.token_ids for done in engine.generate(drawn)],
        "penalised": engine.generate([sample(prompts[0], top_k=1, repetition_penalty=50.0)])[0].token_ids,
    }
    try:
        engine.generate([sample(prompts[0], temperature=float("nan"))])  # fails on rank 0 only; the API would refuse it
    except RuntimeError as err:
        results["failure"] = str(err)
    results["after the failure"] = [done.token_ids for done in engine.generate(greedy)]
    engine.close()
    return results


def _nemo(loaded: object, prompt: object, tokens_to_generate: int) -> dict[str, object]:
    import torch
    from nemo.collections.nlp.modules.common.text_generation_strategy import GPTModelTextGenerationStrategy
    from nemo.collections.nlp.modules.common.text_generation_utils import generate  # what NeMo's server calls

    model = loaded.nemo_model  # type: ignore[attr-defined]
    padded = torch.nn.functional.pad(prompt, (0, tokens_to_generate), value=model.tokenizer.eos_id)  # type: ignore[arg-type]
    output = generate(
        model,
        inputs=(padded, torch.tensor([prompt.shape[1]])),  # type: ignore[attr-defined]
        tokens_to_generate=tokens_to_generate,
        compute_logprob=True,
        greedy=True,
        strategy=GPTModelTextGenerationStrategy(model),
    )
    return {"token_ids": output["token_ids"][0], "logprob": output["logprob"][0].tolist()}


if __name__ == "__main__":
    main()
