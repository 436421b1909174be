"""Config keys that commands written for NeMo and NeMo-Aligner carry and that have no effect here, each with its reason.

Where the reference has a use for a value and this project has none, that value is refused: nobody is to find out after
a training that a setting did nothing. In nemo_configs/ such keys are marked "accepted".
"""

from __future__ import annotations

from typing import NamedTuple


class Accepted(NamedTuple):
    """`values` are those that are accepted; None: any, as the reference makes nothing of them either."""

    values: tuple[object, ...] | None
    why: str


_NOT_CHAT = "it is for data that is no chat; conversations are laid out by model.data.chat_prompt_tokens"
_WHOLE_BATCHES = "the trainer knows whole batches only; it must be True"
_OWN_LOOP = "Lightning does not run the loop, NeMo-Aligner's trainer does"

_OF_A_SPLIT = {
    "shuffle": Accepted(None, "training batches are always drawn at random, validation ones in order"),
    "drop_last": Accepted((True,), _WHOLE_BATCHES),
    "add_eos": Accepted(None, _NOT_CHAT),
    "add_bos": Accepted(None, _NOT_CHAT),
    "add_sep": Accepted(None, _NOT_CHAT),
    "label_key": Accepted(None, _NOT_CHAT),
    "truncation_field": Accepted(None, _NOT_CHAT),
    "truncation_method": Accepted(None, _NOT_CHAT),
    "prompt_template": Accepted(None, _NOT_CHAT),
    "index_mapping_dir": Accepted(None, "files are read into memory, no index is written"),
    "hf_dataset": Accepted(None, "files are read into memory, whoever reads them"),
    "output_original_text": Accepted(None, "validation measures the loss; it does not generate"),
}

# By the name of the config that lists all keys of a program.
ACCEPTED: dict[str, dict[str, Accepted]] = {
    "gpt_sft": {
        "trainer.logger": Accepted((False,), "loggers are exp_manager's"),
        "trainer.enable_checkpointing": Accepted((False,), "checkpoints are exp_manager's"),
        "trainer.use_distributed_sampler": Accepted(None, _OWN_LOOP),
        "trainer.max_time": Accepted((None,), f"{_OWN_LOOP}; exp_manager.max_time_per_run limits a run"),
        "exp_manager.exp_dir": Accepted(None, "exp_manager.explicit_log_dir says where a run writes"),
        "exp_manager.log_step_timing": Accepted(None, f"{_OWN_LOOP}; step_time is always logged"),
        "exp_manager.log_tflops_per_sec_per_gpu": Accepted(None, f"{_OWN_LOOP}; tokens_per_s is always logged"),
        "exp_manager.checkpoint_callback_params.save_best_model": Accepted(
            (False,), "the .nemo holds the last weights; a better step is among the checkpoints"
        ),
        "model.activations_checkpoint_layers_per_pipeline": Accepted((None,), "Megatron Core's layers do not know it"),
        "model.answer_only_loss": Accepted(None, "in chat the loss mask is always the response's (reference 7.1)"),
        "model.save_nemo_on_validation_end": Accepted(None, "Aligner does not read it either"),
        "model.resume_from_checkpoint": Accepted(None, "Aligner does not read it either; exp_manager resumes"),
        "model.ffn_dropout": Accepted((0.0, None), "Megatron Core's layers do not know it; hidden_dropout they do"),
        "model.peft.peft_scheme": Accepted(("none", None), "adapters are not supported; all weights are trained"),
        "model.peft.restore_from_path": Accepted((None,), "adapters are not supported"),
        "model.data.sample": Accepted((False,), "a training draws each conversation once per epoch"),
        "model.data.dataloader_type": Accepted(("single", None), "batches are drawn at random (Aligner since 0.5)"),
        **{f"model.data.train_ds.{key}": row for key, row in _OF_A_SPLIT.items() if key != "output_original_text"},
        **{f"model.data.validation_ds.{key}": row for key, row in _OF_A_SPLIT.items()},
    },
    "megatron_gpt_inference": {
        "trainer.accelerator": Accepted(None, "a server takes the GPU where there is one"),
    },
}
