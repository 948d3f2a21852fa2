# Two commands for a fresh clone: `make demo` and `make test`. Each sets up .venv when it is absent.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := outputs/demo
CHECKPOINT := checkpoints/sera-scenes

.PHONY: demo test bench lint clean

# Memory that a step has freed is kept for the next instead of given back to the system: a sixth of the time of models this small.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 4294967296

# First what the checkpoint in the repository makes of a few scenes of its benchmark, in seconds; then a training from nothing.
# Accelerate starts several processes on one machine's processors through the launcher that it names after GPUs; two processes of
# one thread each train a model this small half as fast again as one process of two threads.
demo: $(VENV)/.installed
	$(BIN)/python training/evaluation.py $(CHECKPOINT)/model --split test --data.num_scenes '[1,1,24]' \
		--output $(OUT)/first/evaluation-test.json --sheet $(OUT)/first/sheet.png
	@echo "What $(CHECKPOINT) makes of 24 scenes is $(OUT)/first/sheet.png. Now a small model is trained from nothing."
	ACCELERATE_USE_CPU=true $(BIN)/accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
		--dynamo_backend no --num_cpu_threads_per_process 1 training/train.py --config training/configs/demo.yaml --output_dir $(OUT)
	$(BIN)/python training/evaluation.py $(OUT)/model --split test --sheet $(OUT)/sheet.png
	@echo "The sheet of examples is $(OUT)/sheet.png; the model is in $(OUT)/model."

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What takes too long for the tests: 20,000 images, segmented in a memory that does not grow.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/dataset_segmentation.py --model $(CHECKPOINT)/model

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first and exact; which build of it comes depends on the index that pip is set to
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) outputs
