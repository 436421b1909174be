"""What NVIDIA's converter does, as a process of its own: `stock_conversion.py HF_FOLDER OUT.nemo`.

Load the whole model with transformers, put query, key and value (and gate and up) together, build NeMo's model, load
the result into it, save. It runs here on the CPU by the same adaptation as everything else in this repository.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    from steerlm_nemo.compat import prepare

    capabilities = prepare()
    import torch
    from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
    from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
    from omegaconf import OmegaConf, open_dict
    from transformers import LlamaForCausalLM

    from steerlm_nemo.checkpoint.from_hf import plan_conversion
    from steerlm_nemo.checkpoint.llama_config import nemo_config
    from steerlm_nemo.compat.model_config import for_this_machine

    theirs = LlamaForCausalLM.from_pretrained(source, torch_dtype=torch.bfloat16)
    plan = plan_conversion(source, None)
    config = OmegaConf.create(nemo_config(plan.config, plan.layout, plan.divisor, "bf16", plan.tokenizer, {}))
    with open_dict(config):
        config.tokenizer.type, config.tokenizer.model = (
            str(source),
            None,
        )  # a tokenizer.json, which NeMo takes by folder
        config.megatron_amp_O2 = True
    config = for_this_machine(config, capabilities)
    hf, state = theirs.state_dict(), {}
    layout = plan.layout
    for rule in plan.rules:
        for layer in range(layout.num_layers) if rule.is_stacked else (None,):
            key = rule.mcore if layer is None else rule.mcore.replace(".layers.", f".layers.{layer}.")
            parts = [hf[name] for name in rule.hf_names(layer)]
            rows = [parts[run.part][run.start : run.start + run.count] for run in rule.runs(layout)]
            packed = torch.cat(rows)  # the bench's vocabulary needs no padding
            # The norms have modules of their own where Transformer Engine does not fuse them into the next layer.
            key = key.replace("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight")
            key = key.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
            state[key.replace("model.", "model.module.", 1)] = packed
    del theirs, hf
    trainer_config = {
        **{"devices": 1, "num_nodes": 1, "accelerator": "cpu", "precision": "bf16", "logger": False},
        **{"enable_checkpointing": False, "use_distributed_sampler": False},
    }
    trainer = MegatronTrainerBuilder(
        OmegaConf.create({"trainer": trainer_config, "exp_manager": None, "model": config})
    ).create_trainer(callbacks=[])
    model = MegatronGPTModel(config, trainer)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or [key for key in missing if not key.endswith("_extra_state")]:
        sys.exit(f"missing {missing[:3]}, unexpected {unexpected[:3]}")
    model.save_to(str(out))


if __name__ == "__main__":
    main()
