# make demo       train a small GPT with AdamW and with StripedAdamW, and compare them
# make test       run the tests
# make lint       check format, rules and types, and build the documentation
# make bench      benchmark optimizers side by side on this CPU (installs the others; 10 minutes)
# make gpu        everything that needs a GPU, from this tree as it is, without .venv (9 minutes)
# make gpu-smoke  a first look on a GPU: kernel tests and kernel times (2 minutes)
# make gpu-check  rehearse `make gpu` without a GPU, every part of it (10 minutes at most)
# make clean      remove the environment and every output

PYTHON ?= python3
BIN := .venv/bin
# each has a thread, and starts up to four more
TEST_PROCESSES ?= 2
# real data for the tests that can use it; they are skipped, with the reason, where it is not there
export STRIPED_HF_TEST_DATA ?= $(wildcard $(abspath ../shared/data))
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test lint bench gpu gpu-smoke gpu-check clean
.DEFAULT_GOAL := demo

.venv/.installed: setup.cfg setup.py pyproject.toml constraints.txt $(wildcard striped_hf/optim/backends/csrc/*)
	@echo "== making .venv and installing striped_hf with the pinned packages (a minute or two)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,recipes,docs]'
	@touch $@

demo: .venv/.installed
	@echo "== writing the documentation topics of this Python as a character data set"
	$(BIN)/python data_scripts/python_docs.py --output_dir data/python_docs
	@echo "== training the same GPT with three optimizers, one after another (about 5 minutes on 2 cores)"
	$(BIN)/python recipes/compare_optimizers.py recipes/train_shakespeare_char.py \
	  --optim adamw_torch_fused striped_adamw striped_adamw_8bit \
	  --output_dir out/demo -- --preset cpu --data_dir data/python_docs
	@echo "== two samples from the model trained with striped_adamw_8bit"
	$(BIN)/python recipes/sample.py out/demo/striped_adamw_8bit --start "The " --num_samples 2 --max_new_tokens 300

test: .venv/.installed
	@echo "== running the tests"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

.venv/.bench: .venv/.installed
	@echo "== installing the optimizers to compare with"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $@

bench: .venv/.bench
	$(BIN)/python -m benchmarks.optimizers --shapes gpt2

gpu:
	$(PYTHON) -m benchmarks.gpu

gpu-smoke:
	$(PYTHON) -m benchmarks.gpu --smoke

gpu-check: .venv/.installed
	@echo "== making an environment like a GPU machine's"
	$(BIN)/python -m benchmarks.gpu_environment build/gpu_environment
	build/gpu_environment/bin/python -m benchmarks.gpu --rehearse

clean:
	rm -rf .venv data out build *.egg-info striped_hf/optim/backends/_cpu*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
