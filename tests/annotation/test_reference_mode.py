"""`--compat nemo1.23` against the reference's algorithm, written down here once more from its description.

The server's values are a checksum of all the text before them, so one byte of difference in any prompt shows.
"""

import json
import random
import subprocess
import sys
from pathlib import Path

import httpx
import live
import pytest
import stub_server
import threads

SCRIPT = Path(__file__).parents[2] / "scripts" / "attribute_annotate.py"
KEYS = (
    *("quality", "toxicity", "humor", "creativity", "violence", "helpfulness", "not_appropriate"),
    *("hate_speech", "sexual_content", "fails_task", "political_content", "moral_judgement"),
)
BODY = {"tokens_to_generate": 1, "temperature": 0.1, "add_BOS": False, "top_k": 1, "top_p": 1.0, "greedy": True}
BODY |= {"all_probs": False, "repetition_penalty": 1.0, "min_tokens_to_generate": 1}
BODY |= {"end_strings": ["<extra_id_1>", "<|endoftext|>"]}


def reference(record, port, process_lang):
    """One value per request, every turn from the first; the label a turn had becomes its last key."""
    keys = (*KEYS, "lang") if process_lang else KEYS
    text = "<extra_id_0>System\n" + record["system"]
    with httpx.Client(trust_env=False) as client:
        for turn in record["conversations"]:
            text += f"<extra_id_1>{turn['from']}\n{turn['value']}\n"
            kept = []
            for key in keys:
                prompt = text + "<extra_id_2>" + ",".join([*kept, f"{key}:"])
                body = {"sentences": [prompt], **BODY}
                answer = client.put(f"http://127.0.0.1:{port}/generate", json=body).json()["sentences"][0]
                items = ("quality" + answer.rpartition("quality")[2]).partition("\n")[0].split(",")
                kept = items[: keys.index(key) + 1]
            label = ",".join(kept)
            old = turn.get("label")
            turn["label"] = label
            if old is not None:
                turn["gt_label"] = old
            text += f"<extra_id_2>{label}\n"
    return json.dumps(record, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("process_lang", [True, False])
@pytest.mark.parametrize("only_generate", [True, False], ids=["NeMo's server", "our server"])
def test_the_output_is_the_references_byte_for_byte(tmp_path, process_lang, only_generate):
    chance = random.Random(4)
    made = threads.records(14)
    for record in made:
        for turn in record["conversations"]:
            if chance.random() < 0.4:
                turn["label"] = chance.choice(["quality:3,toxicity:1", "quality:2,lang:de", "humor:4"])
            elif turn.get("label") is None:
                turn.pop("label", None)
            elif chance.random() < 0.5:
                turn["label"] = turn.pop("label")  # another place among the keys
    source = threads.write(tmp_path / "in.jsonl", made)
    with live.run_app(stub_server.build_stub(only_generate=only_generate)) as port:
        arguments = [f"--input_file_name={source}", f"--output_file_name={tmp_path / 'out.jsonl'}"]
        arguments += ["--compat=nemo1.23", f"--process_lang={process_lang}", "--host=127.0.0.1", f"--port_num={port}"]
        result = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        expected = "".join(reference(record, port, process_lang) for record in threads.read(source))
    assert (tmp_path / "out.jsonl").read_text(encoding="utf-8") == expected
    assert '"gt_label": "quality:3,toxicity:1"}' in expected
