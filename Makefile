# make demo and make test set everything up by themselves; see README.md.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench verify cuda-check gpu-check clean

demo: $(VENV)/installed
	$(BIN)/gti certify --out certificate

test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder tests

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.cpp' '*.h' '*.cu' '*.cuh')
	sh tools/check_includes.sh

bench: $(VENV)/installed
	$(BIN)/gti bench

verify: $(VENV)/installed
	$(BIN)/gti verify

# Compiles every CUDA C++ kernel, without a GPU; fails on spills or a stack frame.
cuda-check: $(VENV)/installed
	$(BIN)/python -m gti_kernels.cuda_kernels check --arch 80,90a,100

# On a machine with a GPU, with the Python that is there; installs nothing.
gpu-check:
	PYTHON=$(PYTHON) tools/gpu_check.sh

# Reinstalled when a source of the compiled part or the packaging changes.
$(VENV)/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/include/gti/*.h csrc/cpu/* python/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cuda,probes,test,lint]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info gti_kernels/*.so
