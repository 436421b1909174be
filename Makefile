# `make help` is the index. Values in capitals can be given: make convert IN=llama-2-7b OUT=llama.nemo
SHELL := /bin/bash
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
READY  := $(VENV)/.ready

# Where the steps leave their files, unless told otherwise.
WORK       ?= results/flow
IN         ?= llama
TREES      ?= trees.jsonl.gz
BASE       ?= $(WORK)/base.nemo
OUT        ?=
TYPE       ?= TEXT_TO_VALUE
FILE       ?= $(WORK)/t2v_train.jsonl
TOKENIZER  ?= $(IN)/tokenizer.model
SEQ_LEN    ?= 4096
LINE       ?= 1
PAGE       ?= $(WORK)/data.html
CONFIG     ?= gpt_sft
VALUE      ?= $(WORK)/value/checkpoints/megatron_gpt_sft.nemo
STEERLM    ?= $(WORK)/steerlm/checkpoints/megatron_gpt_sft.nemo
DEVICES    ?= 1
PROMPT     ?= What is SteerLM?
ATTRIBUTES ?= quality:4,helpfulness:4
ARGS       ?=
# Processes that run tests. Tests of two ranks keep two cores busy; the others wait for one another more than they work.
WORKERS    ?= 2
DATA       ?=
ONLY       ?=
FLOW       ?= toy
TORCH_INDEX ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo flow test genuine clients lint bench convert export inspect preprocess clean inspect-data show-mask \
        train-value train-steerlm serve-value serve-steerlm annotate steer

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## build .venv with the pinned CPU stack (about 2 minutes)

# torch first: any other order can pull a build with several GB of CUDA. Where pip's own index has CUDA builds only:
# make setup TORCH_INDEX=https://download.pytorch.org/whl/cpu
$(READY): pyproject.toml
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -c 'import torch; assert torch.__version__.startswith("2.13.0")' 2>/dev/null \
	  || $(PY) -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==2.13.0
	$(PY) -m pip install --quiet -e '.[cpu,dev]'
	touch $(READY)

demo: $(READY)  ## the whole flow on a toy world, measured; DATA=trees.jsonl.gz for your own trees
	$(PY) scripts/demo.py $(if $(DATA),--data $(DATA)) $(ARGS)

flow: $(READY)  ## run nemo_configs/flows/FLOW.yaml; parameters, --dry-run, --only=STAGE or --from=STAGE as ARGS
	$(PY) scripts/flow.py run nemo_configs/flows/$(FLOW).yaml $(ARGS)

test: $(READY)  ## all tests (no network, no GPU)
	$(PY) -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder tests $(ARGS)

# Their own environments, of pinned versions, are made below .cache/ on first use, by pip; they use all cores.
genuine: $(READY)  ## a genuine model, SmolLM2-135M-Instruct, through every step beside transformers (fetches 1 GB, needs 7 GB)
	OMP_NUM_THREADS=$$(nproc) TORCH_INDEX=$(TORCH_INDEX) $(PY) -m pytest -q tests/genuine $(ARGS)

clients: $(READY)  ## the clients people have, each unmodified in an environment of its own, at real servers (fetches 1 GB)
	TORCH_INDEX=$(TORCH_INDEX) $(PY) -m pytest -q tests/clients $(ARGS)

bench: $(READY)  ## measure against NeMo's own code and the machine's limits; ONLY="convert clean" for some
	$(PY) tests/benchmarks/run.py $(ONLY)

lint: $(READY)  ## ruff and mypy
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy

convert: $(READY)  ## Hugging Face Llama folder IN -> .nemo OUT (BASE)
	$(PY) scripts/convert_hf_llama_to_nemo.py --in-file $(IN) --out-file $(or $(OUT),$(BASE)) $(ARGS)

export: IN = $(STEERLM)
export: $(READY)  ## .nemo IN (STEERLM) -> Hugging Face folder OUT (WORK/hf)
	$(PY) scripts/convert_nemo_to_hf_llama.py --in-file $(IN) --out-file $(or $(OUT),$(WORK)/hf) $(ARGS)

inspect: FILE = $(BASE)
inspect: $(READY)  ## what is in the .nemo FILE (BASE)
	$(PY) scripts/inspect_nemo.py $(FILE) $(ARGS)

preprocess: $(READY)  ## OASST trees TREES -> TYPE records (TEXT_TO_VALUE or VALUE_TO_TEXT) under prefix OUT
	$(PY) scripts/preprocessing.py --input_file=$(TREES) --output_file_prefix=$(or $(OUT),$(WORK)/t2v) --mask_role=User --type=$(TYPE) \
	  --split_ratio=0.95 --seed=10 $(ARGS)

clean: $(READY)  ## drop records of FILE that no longer train anything at SEQ_LEN tokens; writes OUT
	$(PY) scripts/data_clean.py --dataset_file $(FILE) --output_file $(or $(OUT),$(basename $(FILE))_clean.jsonl) --library sentencepiece \
	  --model_file $(TOKENIZER) --seq_len $(SEQ_LEN) $(ARGS)

inspect-data: $(READY)  ## lengths, truncation, grades, languages, duplicates, leaks of FILE (several in quotes), also as PAGE
	$(PY) scripts/inspect_data.py $(FILE) --model_file $(TOKENIZER) --seq_len $(SEQ_LEN) --html $(PAGE) $(ARGS)

show-mask: $(READY)  ## record LINE of FILE as training sees it: bytes, token ids, loss mask, the cut at SEQ_LEN
	$(PY) scripts/show_mask.py --dataset_file $(FILE) --line $(LINE) --library sentencepiece \
	  --model_file $(TOKENIZER) --seq_len $(SEQ_LEN) $(ARGS)

train-value: $(READY)  ## value model from BASE by CONFIG; files as ARGS="model.data.train_ds.file_path=... ..."
	$(PY) scripts/train_gpt_sft.py --config-name=$(CONFIG) model.restore_from_path=$(BASE) \
	  model.data.record_type=TEXT_TO_VALUE exp_manager.explicit_log_dir=$(WORK)/value $(ARGS)

train-steerlm: $(READY)  ## SteerLM model from BASE by CONFIG; files as ARGS
	$(PY) scripts/train_gpt_sft.py --config-name=$(CONFIG) model.restore_from_path=$(BASE) \
	  model.data.record_type=VALUE_TO_TEXT exp_manager.explicit_log_dir=$(WORK)/steerlm $(ARGS)

serve-value: $(READY)  ## serve the VALUE model on port 1424 with DEVICES ranks
	$(PY) scripts/megatron_gpt_eval.py gpt_model_file=$(VALUE) server=True port=1424 trainer.devices=$(DEVICES) $(ARGS)

serve-steerlm: $(READY)  ## serve the STEERLM model on port 1427 with DEVICES ranks
	$(PY) scripts/megatron_gpt_eval.py gpt_model_file=$(STEERLM) server=True port=1427 trainer.devices=$(DEVICES) $(ARGS)

annotate: $(READY)  ## grade the conversations of FILE with the server on port 1424; writes OUT
	$(PY) scripts/attribute_annotate.py --batch_size=16 --host=localhost --port_num=1424 --input_file_name=$(FILE) \
	  --output_file_name=$(or $(OUT),$(basename $(FILE))_annotated.jsonl) $(ARGS)

# Through the environment: a question may have quotes in it.
steer: export QUESTION = $(PROMPT)
steer: $(READY)  ## ask the server on port 1427 PROMPT ($$ for $) at ATTRIBUTES
	$(PY) scripts/steered_inference.py --port_num=1427 --prompt="$$QUESTION" --attributes=$(ATTRIBUTES) $(ARGS)
