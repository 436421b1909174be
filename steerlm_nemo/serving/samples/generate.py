"""`PUT /generate` as engine samples."""

from __future__ import annotations

from steerlm_nemo.engine.protocol import ModelInfo, Sample
from steerlm_nemo.serving.requests.body import BadRequest
from steerlm_nemo.serving.requests.generate import GenerateRequest
from steerlm_nemo.serving.samples.prompts import prompt_ids, room_for, stops

MAX_PROBABILITIES = 2**24  # full_logprob is rows x positions x vocabulary numbers; more would exhaust memory


def generate_samples(asked: GenerateRequest, info: ModelInfo) -> list[Sample]:
    """One engine sample per sentence; tokens_to_generate is clipped to the room the context leaves.

    Raises:
        BadRequest: a prompt is empty or fills the context, or the answer would hold too many probabilities.
    """
    stop_ids, stop_texts = stops(asked.end_strings, info)
    if asked.ignore_eos:
        stop_ids = tuple(token_id for token_id in stop_ids if token_id != info.tokenizer.eos_id)
    least = max(asked.min_tokens_to_generate, asked.min_tokens)
    samples = []
    for index, sentence in enumerate(asked.sentences):
        ids = prompt_ids(sentence, info, asked.add_BOS, f"sentences[{index}]")
        tokens_to_generate = min(asked.tokens_to_generate, room_for(ids, info, f"sentences[{index}]"))
        samples.append(
            Sample(
                prompt_ids=tuple(ids),
                tokens_to_generate=tokens_to_generate,
                min_tokens_to_generate=min(least, tokens_to_generate),
                stops_wait=asked.min_tokens > 0,
                greedy=asked.greedy,
                temperature=asked.temperature,
                top_k=min(asked.top_k, info.vocab_size),
                top_p=asked.top_p,
                repetition_penalty=asked.repetition_penalty,
                stop_ids=stop_ids,
                stop_texts=stop_texts,
                random_seed=asked.random_seed,
                compute_logprob=asked.compute_logprob,
                all_probs=asked.all_probs,
            )
        )
    positions = sum(len(sample.prompt_ids) + sample.tokens_to_generate for sample in samples)
    if asked.all_probs and positions * info.vocab_size > MAX_PROBABILITIES:
        raise BadRequest(
            f"all_probs would answer with {positions} x {info.vocab_size} numbers; at most {MAX_PROBABILITIES} "
            "are sent. Send fewer or shorter sentences, or fewer tokens_to_generate."
        )
    return samples
