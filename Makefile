# `make help` lists the targets. The first of them makes .venv; nothing outside this folder and pip's cache is changed,
# except that `make run` keeps the demonstration's model in ~/.cache/kvfold.

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
SANITIZER ?= compute-sanitizer
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip --disable-pip-version-check
VLLM_PIP := $(VLLM)/bin/python -m pip --disable-pip-version-check
# One thread a worker: workers whose OpenMP threads outnumber the cores wait for each other most of the time.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS)

.PHONY: help run test test-slow test-all test-vllm lint bench sanitize clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|' 2>/dev/null \
	  || sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1: \2/p' $(MAKEFILE_LIST)
	@echo "PYTHON=$(PYTHON) makes .venv, JOBS=$(JOBS) test workers run at once"

run: $(READY)  ## answer one prompt on the ordinary and on a compressed cache
	@$(BIN)/kvfold compare

test: $(READY)  ## the quick tests
	@$(PYTEST) -m "not slow and not gpu"

test-slow: $(READY)  ## the slow tests: torch.compile with inductor, SmolLM2
	@$(BIN)/python -m pytest -m "slow and not gpu"

test-all: test-slow test  ## all tests that need no GPU

test-vllm: $(VLLM)/.ready  ## the tests against the real vLLM, which need no GPU; makes .venv-vllm of 3.4 GB
	@OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest -n $(JOBS) --dist loadgroup tests/test_vllm_*.py

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check .
	@$(BIN)/mypy

bench: $(READY)  ## the kernels beside others on a CUDA device; without one the figures of `make run` as JSON
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
	  $(BIN)/kvfold bench --json benchmarks/results/bench.json --plot benchmarks/results/bench.png; \
	else $(BIN)/kvfold compare --json; fi

# Plainly first, which compiles the kernels and keeps them. Without PyTorch's caching each tensor is an allocation of its
# own, so that memcheck sees reads past its end. API errors are left out, as cuda-bindings asks the driver for functions
# that it need not know; those of a launch are exceptions. Racecheck leaves out cuDNN's attention, which prefill calls and
# in which it reports hazards: --kernel-name-exclude is of Compute Sanitizer 2023.3 (CUDA 12.3) and newer, before it was
# --kernel-regex-exclude.
sanitize: $(READY)  ## small cases of every CUDA kernel on a GPU, plainly and under compute-sanitizer
	@command -v $(SANITIZER) >/dev/null || { \
	  echo "$(SANITIZER) is not there: NVIDIA's CUDA toolkit has it in its bin folder; SANITIZER=path says where"; exit 1; }
	$(BIN)/python tests/sanitized.py
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --report-api-errors no --error-exitcode 1 \
	  $(BIN)/python tests/sanitized.py
	$(SANITIZER) --tool racecheck --kernel-name-exclude kns=cudnn --error-exitcode 1 $(BIN)/python tests/sanitized.py

clean:  ## remove .venv, .venv-vllm and every cache in this folder
	rm -rf $(VENV) $(VLLM) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# -qq: pip's warnings are about the machine it runs on, and errors still show. The pinned torch first, which
# is the small CPU build where one is at hand; any other will do.
$(READY): pyproject.toml
	@echo "== $(VENV): $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -c 'import torch' 2>/dev/null || { \
	  echo "== installing torch, which takes the longest"; \
	  $(PIP) install -qq torch==2.13.0 2>/dev/null || $(PIP) install -qq torch; }
	@echo "== installing kvfold and what its demonstration and tests need"
	@$(PIP) install -qq -e '.[dev]'
	@touch $@

# vLLM's metadata asks for CUDA builds of a dozen packages that its Python part does not need to be imported, so it comes
# without them; what it does need is in the two lists. The constraint keeps the small torch.
$(VLLM)/.ready: pyproject.toml tests/vllm-requirements.txt tests/vllm-bare-requirements.txt
	@echo "== $(VLLM): $$($(PYTHON) --version)"
	@test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	@$(VLLM)/bin/python -c 'import torch' 2>/dev/null || { \
	  echo "== installing torch, which takes the longest"; \
	  $(VLLM_PIP) install -qq torch==2.13.0 2>/dev/null || $(VLLM_PIP) install -qq torch; }
	@$(VLLM_PIP) freeze | grep '^torch==' >$(VLLM)/torch.txt
	@echo "== installing vLLM, and what importing it needs"
	@$(VLLM_PIP) install -qq --no-deps -r tests/vllm-bare-requirements.txt
	@$(VLLM_PIP) install -qq -c $(VLLM)/torch.txt -r tests/vllm-requirements.txt -e '.[cpu,triton]' 2>&1 | grep -v 'vllm 0.33' || true
	@$(VLLM)/bin/python -c 'import vllm, kvfold'
	@touch $@
