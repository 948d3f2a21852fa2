# Two commands for a fresh clone: `make demo` and `make test`. Each sets up .venv when it is absent.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := outputs/demo

.PHONY: demo test lint clean

demo: $(VENV)/.installed
	$(BIN)/accelerate launch --cpu --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no --num_cpu_threads_per_process $$(nproc 2>/dev/null || echo 2) \
		training/train.py --config training/configs/demo.yaml --output_dir $(OUT)
	$(BIN)/python training/evaluation.py $(OUT)/model --split test --sheet $(OUT)/sheet.png
	@echo "The sheet of examples is $(OUT)/sheet.png; the model is in $(OUT)/model."

test: $(VENV)/.installed
	$(BIN)/python -m pytest

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# torch first and exact: an open range could pick a build of several gigabytes
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) outputs
