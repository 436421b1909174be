"""`dequantise.py FILE.gguf FOLDER`: the model in a GGUF file as transformers 5 saves one, in fp32."""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    source, folder = Path(sys.argv[1]), sys.argv[2]
    here = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    dequantised = AutoModelForCausalLM.from_pretrained(**here, dtype=torch.float32)
    config = dequantised.config
    del config.quantization_config  # what the tensors were, and no longer are; with it they are not saved
    model = type(dequantised)(config)
    model.load_state_dict(dequantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**here).save_pretrained(folder)


if __name__ == "__main__":
    main()
