"""One tensor-parallel rank: loads `.nemo` files with NeMo's MegatronGPTModel and stores their logits.

    parity_worker.py TASKS.json

TASKS holds a list of {nemo, token_ids: a safetensors file, logits: where to store them, save: folder or null,
gradients: file or null, responses: {prompts, num_tokens, file} or null}. With `save`, NeMo's own checkpoint writer
stores the loaded weights there; with `gradients`, those of query and key norms by the language-model loss, as this rank
finds them alone and as training has them; with `responses`, what the engine generates greedily after the prompts.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlm_nemo.models.loading import LoadedModel, load_for_inference
from steerlm_nemo.models.logits_check import nemo_logits

if TYPE_CHECKING:
    import torch


def main() -> None:
    from safetensors.torch import load_file, save_file

    from steerlm_nemo.compat.layers import complete_qk_norm_gradients

    tp_size = int(os.environ["WORLD_SIZE"])
    for task in json.loads(Path(sys.argv[1]).read_text()):
        loaded = load_for_inference(task["nemo"], tp_size, "32")
        model = loaded.nemo_model
        logits = {name: nemo_logits(model, token_ids) for name, token_ids in load_file(task["token_ids"]).items()}
        if os.environ["RANK"] == "0":
            save_file(logits, task["logits"])
        if task["save"]:
            from nemo.utils.callbacks.dist_ckpt_io import DistributedCheckpointIO

            writer = DistributedCheckpointIO.from_config(model.cfg, async_save=False)
            writer.save_checkpoint(model.sharded_state_dict(), task["save"])
        if task["gradients"]:
            (token_ids,) = load_file(task["token_ids"]).values()
            found = {f"alone.{name}": grad for name, grad in norm_gradients(model, token_ids).items()}
            complete_qk_norm_gradients(model)
            found |= norm_gradients(model, token_ids)
            if os.environ["RANK"] == "0":
                save_file(found, task["gradients"])
        if task["responses"]:
            serve(loaded, **task["responses"])


def serve(loaded: LoadedModel, prompts: list[list[int]], num_tokens: int, file: str) -> None:
    """All prompts together, in steps that take the longer ones in pieces."""
    from steerlm_nemo.engine.megatron import EngineSettings, MegatronEngine
    from steerlm_nemo.engine.protocol import Sample, complete

    loaded.nemo_model.freeze()
    engine = MegatronEngine(loaded, "model", EngineSettings(8, 37, 0.01, prefix_reuse=True))
    if os.environ["RANK"] != "0":
        engine.follow()
        return
    samples = [Sample(tuple(prompt), num_tokens, greedy=True, stop_ids=()) for prompt in prompts]
    done = [response.token_ids for response in complete(engine, samples)]
    Path(file).write_text(json.dumps([ids[-num_tokens:] for ids in done]))
    engine.close()


def norm_gradients(model: Any, token_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    import torch

    model.unfreeze()
    model.model.zero_grad()
    length = len(token_ids)
    future = torch.ones(1, 1, length, length, dtype=torch.bool).triu(1)
    labels = token_ids.roll(-1).reshape(1, -1)
    with torch.enable_grad():
        losses = model.model(token_ids.reshape(1, -1), torch.arange(length).reshape(1, -1), future, labels=labels)
        losses[0, :-1].mean().backward()
    layers = enumerate(model.model.decoder.layers)
    return {
        f"{number}.{name}": getattr(layer.self_attention, name).weight.grad.clone()
        for number, layer in layers
        for name in ("q_layernorm", "k_layernorm")
    }


if __name__ == "__main__":
    main()
