# make install   .venv with everything, csrc/ compiled; quick when nothing changed
# make run       the job of CONFIG
# make test      the test suite
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

# Packages of the machine, an older torch among them, must not be seen from .venv.
unexport PYTHONPATH PYTHONHOME

.PHONY: install run test lint clean

install: .venv/installed

run: install
	$(BIN)/torchrun --standalone engine/launch.py $(CONFIG)

test: install
	$(BIN)/python -m pytest -q

lint: install
	$(BIN)/ruff check .
	$(BIN)/pyright

clean:
	rm -rf .venv build *.egg-info engine/ops/*.so

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
