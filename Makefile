.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUNS ?= runs
# A file at a time on each core, by name: those of most tests first would leave a core idle at the end.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "locat-lightning needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs,channels,onnx,parquet,retrieval]'
	@touch $@

.PHONY: help install quickstart segment study test test-fast test-compilers test-faults coverage check format bench kernels gpu scale \
	figures docs

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(INSTALLED) ## make .venv with the pinned versions of constraints.txt

test: $(INSTALLED) ## run the tests but for those of compilers and of faults
	$(PYTEST)

test-fast: $(INSTALLED) ## run the tests but for those of whole runs
	$(PYTEST) -m "not slow and not compilers and not faults"

test-compilers: $(INSTALLED) ## run the tests of what torch.compile, ONNX and Triton make of the models
	$(PYTEST) -m compilers

test-faults: $(INSTALLED) ## kill, interrupt, damage and starve runs, and count what comes of it: all, or FILES="tests/faults/…"
	$(PYTEST) -m faults $(or $(FILES),tests/faults tests/commands/test_fit_processes.py \
		tests/commands/test_killed.py tests/commands/test_restarts.py)

coverage: $(INSTALLED) ## run the tests and print the line coverage of src/
	$(PYTEST) -m 'not faults' --cov=src --cov-report=term-missing:skip-covered

check: $(INSTALLED) ## format, lint and strict types, without changing a file
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(INSTALLED) ## format and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

quickstart: $(INSTALLED) ## train a LocAtViT and a plain ViT on real digits, minutes on a CPU
	$(BIN)/locat fit --config quickstart.yaml --runs $(RUNS) --name quickstart_vit \
		--model.backbone_args.gaug false --model.backbone_args.prr false
	$(BIN)/locat fit --config quickstart.yaml --runs $(RUNS) --name quickstart_locatvit
	@echo; $(BIN)/locat runs $(RUNS)
	@echo 'look: $(BIN)/tensorboard --logdir $(RUNS)'

segment: $(INSTALLED) ## after quickstart: what the patch features of its two models are worth, minutes on a CPU
	for model in vit locatvit; do \
		$(BIN)/locat fit --config segment_digits.yaml --runs $(RUNS) --name segment_$$model \
			--weights $(RUNS)/quickstart_$$model/version_0/checkpoints/best.ckpt || exit; \
	done
	@echo; $(BIN)/locat runs $(RUNS)

study: PRESET ?= cpu
study: $(INSTALLED) ## write docs/results.md, half a day on a CPU: make study IMAGES=cifar10.tar.gz MASKS=camvid.tar [PRESET=cpu]
	@test -n "$(IMAGES)" -a -n "$(MASKS)" || { echo 'make study needs IMAGES=… (CIFAR-10: train/CLASS/*, test/CLASS/*)' \
		'and MASKS=… (CamVid, as segment_folder.yaml reads it): folders, or .tar archives of them' >&2; exit 2; }
	$(BIN)/locat study --config study_cifar.yaml --preset $(PRESET) --records docs/study/$(PRESET) \
		--report docs/results.md --folders.images "$(IMAGES)" --folders.masks "$(MASKS)"

bench: $(INSTALLED) ## measure: what LocAt costs, views per second, k-NN, features from files, a step of each method, mixings and SAM, the segmentation head
	$(BIN)/python benchmarks/backbones.py
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/knn.py
	$(BIN)/python benchmarks/features.py
	$(BIN)/python benchmarks/methods.py
	$(BIN)/python benchmarks/mixing.py
	$(BIN)/python benchmarks/segmentation.py

kernels: $(INSTALLED) ## compile the Triton kernels for three kinds of GPU, without one: registers, spills, instructions
	$(BIN)/python benchmarks/traffic.py
	$(BIN)/python benchmarks/kernels.py

gpu: $(INSTALLED) ## measure on a CUDA device within MINUTES (8): attention, training steps, runs from files
	$(BIN)/python benchmarks/gpu.py --minutes $(or $(MINUTES),8)
	$(BIN)/python benchmarks/refresh.py

scale: $(INSTALLED) ## compute what a run on 1 to 1,024 GPUs sends, reads and writes, and write the tables of docs/scaling.md
	$(BIN)/python benchmarks/scale.py

figures: $(INSTALLED) ## measure again every figure of README and docs but the study's, an hour on a CPU
	rm -rf build/figures
	$(MAKE) quickstart segment RUNS=build/figures
	for method in dino ibot dinov2 selfpatch mae simmim; do \
		$(BIN)/locat fit --config $${method}_digits.yaml --runs build/figures || exit; \
	done
	$(BIN)/locat fit --config distill_digits.yaml --runs build/figures \
		--model.teacher build/figures/dinov2_digits/version_0/checkpoints/last.ckpt
	$(BIN)/python benchmarks/refresh.py build/figures

docs: $(INSTALLED) ## build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo 'read: build/site/index.html'
