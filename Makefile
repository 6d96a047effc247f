# make install   .venv with everything, csrc/ compiled; quick when nothing changed
# make run       the job of CONFIG
# make test      the test suite
# make thorough  the same, its long tests in full: every process killed in every phase, a thousand formulas
# make multinode hosts of network namespaces, whose links are cut: minutes, as root
# make sglang    .venv-sglang, in which SGLang serves: real generators on GPUs, on a CPU for tests
# make lint      style and types

PYTHON ?= python3
CONFIG ?= configs/tiny.toml
TORCH := torch==2.13.0
PINS := $(TORCH) transformers==5.12.1
# make TORCH_INDEX=URL takes torch from an index of your choice, one of CPU builds for instance.
TORCH_INDEX ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip
HEADERS := $(CURDIR)/.venv/headers/usr/include

# SGLang pins much, so it has an environment of its own. It takes the rest of its packages from the second list; with CUDA
# it takes all that it asks for by itself. Without CUDA its kernels have no wheel: tests/stand_ins take their place.
SGLANG := sglang==0.5.18
SGLANG_BARE := $(SGLANG) xgrammar==0.2.1
SGLANG_NEEDS := $(PINS) triton==3.7.1 openai==2.6.1 outlines==0.1.11 aiohttp anthropic apache-tvm-ffi blobfile \
	compressed-tensors datasets distro einops fastapi gguf interegular IPython llguidance modelscope msgspec ninja numba \
	openai-harmony orjson partial_json_parser pillow prometheus-client psutil py-spy pybase64 pydantic python-multipart \
	pyzmq requests scipy sentencepiece setproctitle soundfile tiktoken tqdm uvicorn uvloop watchfiles xxhash zstandard
SGLANG_PIP := .venv-sglang/bin/python -m pip
CUDA := $(shell command -v nvidia-smi)

# Packages of the machine, an older torch among them, must not be seen from .venv.
unexport PYTHONPATH PYTHONHOME

.PHONY: install sglang run test thorough multinode lint clean

install: .venv/installed

sglang: .venv-sglang/installed

run: install
	$(BIN)/torchrun --standalone engine/launch.py $(CONFIG)

test:
	$(MAKE) -j2 install sglang
	$(BIN)/python -m pytest -q -n 2 --durations=25 --ignore=tests/test_multinode.py

thorough:
	LEEWAY_THOROUGH=1 $(MAKE) test

multinode: install
	$(BIN)/python -m pytest -q -m multinode

lint: install
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

clean:
	rm -rf .venv .venv-sglang build *.egg-info engine/ops/*.so

.venv/made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	@command -v c++ >/dev/null || { echo "a C++ compiler is needed: apt install g++"; exit 1; }
	$(PYTHON) -m venv --clear .venv
	touch $@

# Debian keeps Python.h in a package of its own; it is unpacked here where the machine lacks it.
.venv/headers: .venv/made
	@mkdir -p $@
	@$(BIN)/python -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || \
	{ cd $@ && apt-get download -q libpython$$(../bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')-dev \
	  && dpkg -x libpython*.deb . || { echo "Python.h is missing: apt install python3-dev"; rm -rf $(CURDIR)/$@; exit 1; }; }

# Programs of a model run inside bubblewrap; Debian's is unpacked here where the machine lacks it.
.venv/bubblewrap: .venv/made
	@mkdir -p $@
	@command -v bwrap >/dev/null || \
	{ cd $@ && { apt-get download -q bubblewrap || { apt-get update -q && apt-get download -q bubblewrap; }; } \
	  && dpkg -x bubblewrap*.deb . && ln -sf ../bubblewrap/usr/bin/bwrap ../bin/bwrap \
	  || { echo "bubblewrap is missing: the reward code refuses to run without it (apt install bubblewrap)"; \
	       rm -rf $(CURDIR)/$@; }; }

# torch comes first and alone, by its exact version: the extension is compiled against it.
.venv/torch: .venv/headers
	$(PIP) install $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PIP) install "setuptools>=77.0.3" wheel ninja "pybind11>=2.13"
	touch $@

.venv/installed: .venv/torch .venv/bubblewrap pyproject.toml setup.py $(shell find csrc -type f)
	CPATH=$(HEADERS):$$(echo $(HEADERS)/python3*) PATH="$(CURDIR)/$(BIN):$$PATH" \
	$(PIP) install --no-build-isolation $(PINS) -e ".[test]"
	touch $@

# torch comes first here too: a looser request would pull the CUDA build where there is no CUDA.
.venv-sglang/installed: Makefile
	$(PYTHON) -m venv --clear .venv-sglang
	$(if $(CUDA),,$(SGLANG_PIP) install $(TORCH) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)))
	$(if $(CUDA),$(SGLANG_PIP) install $(SGLANG),$(SGLANG_PIP) install --no-deps $(SGLANG_BARE))
	$(if $(CUDA),,$(SGLANG_PIP) install $(SGLANG_NEEDS))
	@$(if $(CUDA),,.venv-sglang/bin/python -c 'import torch, sys; sys.exit(torch.version.cuda and "the CUDA build of torch came: make TORCH_INDEX=URL")')
	touch $@
