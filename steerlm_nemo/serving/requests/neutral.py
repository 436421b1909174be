"""Keys that clients of other servers spell out although they change nothing here: a row each.

A value that asks for what happens anyway is accepted; any other is refused, with the reason. A route that has a key of
its own by the same name takes that one. The names are those of OpenAI's API, of vLLM, TGI, sglang, TensorRT-LLM and
llama.cpp, of transformers' `generate` and of NeMo's and Megatron's servers; null counts as left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MOST_SHOWN = 80  # characters of a value


@dataclass(frozen=True)
class Neutral:
    """`values` are accepted (None: any, for a key that could not change an answer), as `why` no other is.

    `holds_keys`: an object is accepted, too, whose keys are all of the table and neutral.
    """

    values: tuple[Any, ...] | None
    why: str = "without effect"
    holds_keys: bool = False

    def takes(self, value: Any) -> bool:
        if self.values is None or any(_same(value, neutral) for neutral in self.values):
            return True
        if not self.holds_keys or not isinstance(value, Mapping):
            return False
        return all(item is None or (key in GENERATION and GENERATION[key].takes(item)) for key, item in value.items())

    def schema(self) -> dict[str, Any]:
        """As the document shows it."""
        if self.values is None:
            return {"description": "Accepted, without effect."}
        told = {"description": f"Other values are refused: {self.why}."}
        return {**told, "type": ["object", "null"]} if self.holds_keys else {**told, "enum": [*self.values, None]}

    def refusal(self, where: str, value: Any) -> str:
        """What who sent `value` is told. An object is named by its type, where it has one."""
        told, accepted = value, list(self.values or ())
        if isinstance(value, Mapping) and isinstance(value.get("type"), str):
            where, told = f"{where} type", value["type"]
            accepted = [part["type"] if isinstance(part, Mapping) and "type" in part else part for part in accepted]
        instead = " or ".join([*map(shown, accepted), "leaving it out"])
        return f"{where} {shown(told)} is not supported: {self.why}; accepted: {instead}"


def shown(value: Any) -> str:
    """A value as an error quotes it: as JSON, strings as Python does, and short, whatever was sent."""
    if isinstance(value, str):
        text = repr(value[: _MOST_SHOWN + 1])
    else:
        text = ""
        for piece in json.JSONEncoder().iterencode(value):
            text += piece
            if len(text) > _MOST_SHOWN:
                break
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "..."


def _same(value: Any, neutral: Any) -> bool:
    """Equal as JSON, where false is not 0; what is null in an object is not there."""
    if isinstance(value, Mapping) and isinstance(neutral, Mapping):
        value = {key: item for key, item in value.items() if item is not None}
    return bool(value == neutral) and isinstance(value, bool) == isinstance(neutral, bool)


_ANY = Neutral(None)


def _no(why: str, *neutral: Any) -> Neutral:
    return Neutral(neutral, why)


_NO_BEAMS = "there is no beam search, only greedy and sampled text"
_NO_RULES = "the text of the model is not constrained"
_NO_TOOLS = "the model calls no tools"
_NO_TEMPLATE = "the prompt is built as the model was trained on it"
_NO_SAMPLER = "there is no such sampling rule; temperature, top_p and top_k are there"
_NO_DETAILS = "no such part of an answer is there"
_NO_CUT = "a prompt is taken whole or refused"
_TEXT_ONLY = "text is all that is read and written"
_NOT_SERVED = "this server has no such function"

# Of the requests that generate text, /generate and OpenAI's.
GENERATION: dict[str, Neutral] = {
    # How the text is searched for.
    "best_of": _no("every text that is made is answered", 1),
    "use_beam_search": _no(_NO_BEAMS, False),
    "num_beams": _no(_NO_BEAMS, 1),
    "num_beam_groups": _no(_NO_BEAMS, 1),
    "beam_width": _no(_NO_BEAMS, 1),
    "beam_search_diversity_rate": _no(_NO_BEAMS, 0),
    "diversity_penalty": _no(_NO_BEAMS, 0),
    "length_penalty": _no(_NO_BEAMS, 1, 0),
    "early_stopping": _no(_NO_BEAMS, False),
    "num_return_sequences": _no("the number of texts is n", 1),
    "do_sample": _no("greedy text is asked for with temperature 0, or greedy: true at /generate", True),
    "use_greedy": _no("greedy text is asked for with temperature 0, or greedy: true at /generate", False),
    # Sampling.
    "n": _no("there is one text per sentence", 1),
    "min_p": _no("/v1/completions has it", 0),
    "frequency_penalty": _no("/v1/completions has it", 0),
    "presence_penalty": _no("/v1/completions has it", 0),
    "logit_bias": _no("/v1/completions has it", {}),
    "typical_p": _no(_NO_SAMPLER, 1),
    "typical": _no(_NO_SAMPLER, 1),
    "tfs_z": _no(_NO_SAMPLER, 1),
    "top_a": _no(_NO_SAMPLER, 0),
    "top_n_sigma": _no(_NO_SAMPLER, -1, 0),
    "top_p_min": _no(_NO_SAMPLER, 0),
    "top_p_decay": _no(_NO_SAMPLER, 0, 1),
    "top_p_bound": _no(_NO_SAMPLER, 0),
    "mirostat": _no(_NO_SAMPLER, 0),
    "eta_cutoff": _no(_NO_SAMPLER, 0),
    "epsilon_cutoff": _no(_NO_SAMPLER, 0),
    "xtc_probability": _no(_NO_SAMPLER, 0),
    "dry_multiplier": _no(_NO_SAMPLER, 0),
    "dynatemp_range": _no(_NO_SAMPLER, 0),
    "encoder_repetition_penalty": _no(_NO_SAMPLER, 1),
    "no_repeat_ngram_size": _no(_NO_SAMPLER, 0),
    "repetition_detection": _no(_NO_SAMPLER, {}),
    "penalty_alpha": _no(_NO_SAMPLER, 0),
    "watermark": _no("texts get no watermark", False),
    "watermarking": _no("texts get no watermark", False),
    "custom_params": _no(_NO_SAMPLER, {}),
    "custom_logit_processor": _no(_NO_SAMPLER, ""),
    "logits_processors": _no(_NO_SAMPLER, []),
    # Which tokens are allowed.
    "bad_words": _no(_NO_RULES + "; logit_bias of -100 keeps a token out", []),
    "bad_words_ids": _no(_NO_RULES + "; logit_bias of -100 keeps a token out", []),
    "allowed_token_ids": _no(_NO_RULES),
    "force_words_ids": _no(_NO_RULES, []),
    "guided_json": _no(_NO_RULES),
    "guided_regex": _no(_NO_RULES, ""),
    "guided_choice": _no(_NO_RULES, []),
    "guided_grammar": _no(_NO_RULES, ""),
    "guided_decoding_backend": _ANY,
    "guided_whitespace_pattern": _ANY,
    "structured_outputs": _no(_NO_RULES, {}),
    "structural_tag": _no(_NO_RULES, ""),
    "json_schema": _no(_NO_RULES),
    "grammar": _no(_NO_RULES, ""),
    "regex": _no(_NO_RULES, ""),
    "ebnf": _no(_NO_RULES, ""),
    "response_format": _no(_NO_RULES, {"type": "text"}),
    # Where the text ends.
    "stop": _no("/generate takes end_strings", []),
    "stop_sequences": _no("stop, or end_strings at /generate, is the key for it", []),
    "stop_words_list": _no("stop, or end_strings at /generate, is the key for it", []),
    "stop_words": _no("stop, or end_strings at /generate, is the key for it", []),
    "stop_regex": _no("stop strings are no patterns", "", []),
    "stop_token": _no("stop_token_ids of /v1/completions is the key for it"),
    "stop_token_ids": _no("/v1/completions has it", []),
    "stop_on_eol": _no("stop, or end_strings at /generate, is the key for it", False),
    "stop_on_double_eol": _no("stop, or end_strings at /generate, is the key for it", False),
    "prevent_newline_after_colon": _no(_NO_RULES, False),
    "include_stop_str_in_output": _no("sentences end with what ended them", True),
    "no_stop_trim": _no("include_stop_str_in_output of /v1/ is the key for it", False),
    "min_new_tokens": _no("min_tokens is the key for it", 0),
    "min_length": _no("min_tokens is the key for it", 0),
    # Other names of what there is.
    "max_tokens": _no("tokens_to_generate is the key for it"),
    "max_completion_tokens": _no("max_tokens of /v1/ or tokens_to_generate of /generate is the key for it"),
    "max_new_tokens": _no("max_tokens of /v1/ or tokens_to_generate of /generate is the key for it"),
    "max_length": _no("max_tokens of /v1/ or tokens_to_generate of /generate is the key for it"),
    "seed": _no("random_seed is the key for it"),
    "inputs": _no("prompt of /v1/completions or sentences of /generate is the key for it"),
    # The prompt.
    "echo": _no("/v1/completions has it", False),
    "suffix": _no("text is continued at its end only", ""),
    "add_special_tokens": _no("add_BOS of /v1/completions and /generate is the key for it", False),
    "prompt_embeds": _no(_TEXT_ONLY),
    "truncate": _no(_NO_CUT),
    "truncation_side": _ANY,
    "truncate_prompt_tokens": _no(_NO_CUT),
    "image_list": _no(_TEXT_ONLY, []),
    "media_io_kwargs": _no(_TEXT_ONLY, {}),
    "mm_processor_kwargs": _no(_TEXT_ONLY, {}),
    # What is answered.
    "stream": _no("/generate answers when all is there; /v1/completions streams", False),
    "stream_options": _no("/v1/completions streams", {}),
    "stream_interval": _no("a piece is sent as soon as it is there", 1),
    "detokenize": _no(_NO_DETAILS, True),
    "skip_special_tokens": _no("it is true or false; special tokens have no text here", True, False),
    "spaces_between_special_tokens": _no("it is true or false; special tokens have no text here", True, False),
    "details": _no(_NO_DETAILS, False),
    "decoder_input_details": _no("/v1/completions has echo with logprobs, /generate compute_logprob", False),
    "logprobs": _no("/v1/completions has them, /generate compute_logprob", False),
    "top_logprobs": _no("/v1/chat/completions has them; at /v1/completions the key is logprobs", 0),
    "top_n_tokens": _no("/v1/completions has logprobs", 0),
    "prompt_logprobs": _no("/v1/completions has echo with logprobs, /generate compute_logprob"),
    "return_logprob": _no("/v1/completions has logprobs, /generate compute_logprob", False),
    "get_logprobs": _no("/v1/completions has logprobs, /generate compute_logprob", False),
    "output_scores": _no("/v1/completions has logprobs, /generate compute_logprob", False),
    "logprob_start_len": _ANY,
    "logprob_token_ids": _no("the likeliest tokens are told, by their number", []),
    "return_dict_in_generate": _ANY,
    "return_tokens_as_token_ids": _no(_NO_DETAILS, False),
    "return_token_ids": _no(_NO_DETAILS, False),
    "return_token_offsets": _no(_NO_DETAILS, False),
    "return_prompt_text": _no(_NO_DETAILS, False),
    "return_hidden_states": _no(_NO_DETAILS, False),
    "return_routed_experts": _no(_NO_DETAILS, False),
    "return_meta_info": _no(_NO_DETAILS, False),
    "return_mm_kwargs": _ANY,
    "routed_experts_prompt_start": _ANY,
    "output_hidden_states": _no(_NO_DETAILS, False),
    "output_attentions": _no(_NO_DETAILS, False),
    # Keys that hold others.
    "parameters": Neutral(({},), "what it holds are keys of the body itself", holds_keys=True),
    "sampling_params": Neutral(({},), "what it holds are keys of the body itself", holds_keys=True),
    "extra_body": Neutral(({},), "what it holds are keys of the body itself", holds_keys=True),
    "extra_headers": _ANY,
    "extra_query": _ANY,
    "vllm_xargs": _no(_NOT_SERVED, {}),
    # Whose request it is, and how it travels.
    "user": _ANY,
    "metadata": _ANY,
    "store": _ANY,
    "service_tier": _ANY,
    "safety_identifier": _ANY,
    "prediction": _ANY,
    "prompt_cache_key": _ANY,
    "prompt_cache_options": _ANY,
    "prompt_cache_retention": _ANY,
    "moderation": _no(_NOT_SERVED),
    "request_id": _ANY,
    "rid": _ANY,
    "session_id": _ANY,
    "session_params": _no(_NOT_SERVED, {}),
    "cache_salt": _ANY,
    "cache_prompt": _ANY,
    "use_cache": _ANY,
    "timeout": _ANY,
    "no_log": _ANY,
    "compute_attention_mask": _ANY,
    "data_parallel_rank": _ANY,
    "priority": _no("requests are served as they come", 0),
    "kv_transfer_params": _no(_NOT_SERVED, {}),
    "ec_transfer_params": _no(_NOT_SERVED, {}),
    "lora_path": _no("one model is served, without adapters", ""),
    "adapter_id": _no("one model is served, without adapters", ""),
}

# Of OpenAI's chats besides.
CHAT: dict[str, Neutral] = {
    "tools": _no(_NO_TOOLS, []),
    "tool_choice": _no(_NO_TOOLS, "none", "auto"),
    "parallel_tool_calls": _ANY,
    "functions": _no(_NO_TOOLS, []),
    "function_call": _no(_NO_TOOLS, "none", "auto"),
    "web_search_options": _no(_NO_TOOLS),
    "modalities": _no(_TEXT_ONLY, ["text"]),
    "audio": _no(_TEXT_ONLY),
    "reasoning_effort": _no("the model does not reason apart from its response", "none"),
    "reasoning": _no("the model does not reason apart from its response", {}, {"effort": "none"}),
    "thinking": _no("the model does not reason apart from its response", {"type": "disabled"}),
    "enable_thinking": _no("the model does not reason apart from its response", False),
    "thinking_token_budget": _no("the model does not reason apart from its response", 0),
    "include_reasoning": _ANY,
    "separate_reasoning": _ANY,
    "stream_reasoning": _ANY,
    "verbosity": _no("attributes steer a response; GET /v1/attributes lists them", "medium"),
    "chat_template": _no(_NO_TEMPLATE),
    "chat_template_kwargs": _no(_NO_TEMPLATE, {}, {"enable_thinking": False}),
    "documents": _no(_NO_TEMPLATE, []),
}

# Of a message: what one has besides that an earlier answer brought, or that a client always spells out.
MESSAGE: dict[str, Neutral] = {
    "name": _ANY,
    "type": _no(_TEXT_ONLY, "text", "message"),
    "refusal": _no("a refusal has no place in a prompt; send it as content", ""),
    "annotations": _no(_TEXT_ONLY, []),
    "audio": _no(_TEXT_ONLY),
    "images": _no(_TEXT_ONLY, []),
    "function_call": _no(_NO_TOOLS),
    "tool_calls": _no(_NO_TOOLS, []),
    "tool_call_id": _no(_NO_TOOLS, ""),
    "reasoning": _no("reasoning has no place in a prompt", ""),
    "reasoning_content": _no("reasoning has no place in a prompt", ""),
    "thinking_blocks": _no("reasoning has no place in a prompt", []),
    "cache_control": _ANY,
    "provider_specific_fields": _ANY,
    "id": _ANY,
}

# Of what is asked of a model that has no attributes.
WITHOUT_ATTRIBUTES = {"attributes": _no("this model has no attributes", {})}

# Of a part of a message.
PART: dict[str, Neutral] = {"cache_control": _ANY, "annotations": _no(_TEXT_ONLY, [])}

STREAM_OPTIONS: dict[str, Neutral] = {
    "include_obfuscation": _ANY,
    "chunk_size": _no(GENERATION["stream_interval"].why, 1),
}
