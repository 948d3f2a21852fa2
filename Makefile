# For a fresh clone: `make demo` and `make test`. Each sets up .venv when it is absent.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT := outputs/demo
SCENES := checkpoints/sera-scenes
PHOTOS := checkpoints/sera-photos
DATA := data

.PHONY: demo test bench lint sera-photos checkpoint-code archive clean

# Memory that a step frees is kept for the next step and not given back to the system. It saves a sixth of the time of small models.
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 4294967296

# First the checkpoint of photographs segments those in docs/photos, which takes seconds. Then a small model is trained from nothing.
# Accelerate starts several processes on the CPUs of one machine by its option --multi_gpu. Two processes of one thread each train so
# small a model 1.5 times as fast as one process of two threads.
demo: $(VENV)/.installed
	@echo "1 of 3: $(PHOTOS) segments the photographs in docs/photos. This takes about half a minute on two cores."
	$(BIN)/python training/segment.py $(PHOTOS) --data docs/photos/phrases.csv --output $(OUT)/photos --preview 28
	@echo "The masks are in $(OUT)/photos/preview.png."
	@echo "2 of 3: a small model is trained from nothing on drawn scenes. This takes 5 to 8 minutes on two cores."
	ACCELERATE_USE_CPU=true $(BIN)/accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \
		--dynamo_backend no --num_cpu_threads_per_process 1 training/train.py --config training/configs/demo.yaml --output_dir $(OUT)
	@echo "3 of 3: that model is scored. This takes about a minute."
	$(BIN)/python training/evaluation.py $(OUT)/model --split test --sheet $(OUT)/sheet.png
	@echo "The sheet of examples is $(OUT)/sheet.png; the model is in $(OUT)/model."

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What takes too long for the tests: 20,000 images, segmented in a memory that does not grow; the cost of checking 10,000 rows.
bench: $(VENV)/.installed
	$(BIN)/python benchmarks/dataset_segmentation.py --model $(SCENES)
	$(BIN)/python benchmarks/row_checks.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# checkpoints/sera-photos from data and towers in $(DATA), see docs/training.md. Each step goes on where it was stopped.
sera-photos: $(VENV)/.installed
	test -f outputs/photos-text/config.json || $(BIN)/python training/distil_text.py --config training/configs/photos-text.yaml
	$(BIN)/python training/train.py --config training/configs/photos.yaml --output_dir outputs/sera-photos
	$(BIN)/python training/evaluation.py outputs/sera-photos --split held_out --fit_scores
	$(BIN)/python training/evaluation.py outputs/sera-photos --split val

# The archive of a release, for those who do not clone, and its checksum.
archive:
	tar -czf $(notdir $(PHOTOS)).tar.gz -C $(dir $(PHOTOS)) $(notdir $(PHOTOS))
	sha256sum $(notdir $(PHOTOS)).tar.gz

# The code beside the weights of each checkpoint, which `trust_remote_code` runs. Run this after every change of the two packages.
checkpoint-code:
	for folder in checkpoints/*/; do rm -f $$folder*_sera.py; cp modeling_sera/*_sera.py processing_sera/*_sera.py $$folder; done

# torch comes first, in the exact version; pip's index decides which build of it is installed
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) outputs
