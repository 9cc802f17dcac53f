# The project's commands. `make` alone lists them; `make demo` is where a newcomer starts.
#
# Everything runs in .venv, which `make install` builds from the lock file under requirements/ that fits the Python at
# hand. Another Python: make install PYTHON=python3.12

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo test slow parity aot slices format lock clean rebuild

VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PARITY := .venv-parity
PREFLIGHT := .venv-preflight
DEPENDENCIES := setup.py pyproject.toml requirements/install.py $(wildcard requirements/lock-py*.txt)
VERSION := import sys; print(sys.version_info[:2])

ifeq ($(origin PYTHON),undefined)
  # The environment's own Python once there is one, else the first that is new enough.
  PYTHON := $(or $(wildcard $(RUN)),$(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
    $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done),python3)
else ifneq ($(shell $(PYTHON) -c '$(VERSION)' 2>/dev/null),$(shell $(RUN) -c '$(VERSION)' 2>/dev/null))
  # A Python asked for by name, of another version than the environment's: the environment is built anew.
  REBUILD := rebuild
endif

# Tests: on the CPU, compiled programs kept between runs, and one thread each, because WORKERS processes share the
# machine. WORKERS=0 runs them in one process, which a debugger needs.
WORKERS ?= 2
TEST_ENVIRONMENT := JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
PYTEST := $(TEST_ENVIRONMENT) $(RUN) -m pytest -n $(WORKERS) --dist loadfile
ARGS ?=

help:  ## this list
	@echo "avlm_jax: audio-visual video language models in JAX. Commands:"
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

install: $(STAMP)  ## build .venv from the lock file (once; instant when nothing changed)

$(STAMP): $(DEPENDENCIES) $(REBUILD)
	@$(PYTHON) requirements/install.py $(VENV)
	@touch $@

rebuild:

demo: $(STAMP)  ## the whole of SAVEnVideo in ten minutes; the report goes to runs/demo (ARGS="..." for options)
	@$(RUN) -m avlm_jax demo $(ARGS)

test: $(STAMP)  ## lint and tests, some twenty minutes on two cores (ARGS="tests/test_config.py" for some)
	@$(RUN) -m ruff check --quiet .
	@$(RUN) -m ruff format --check . || { echo "Run \`make format\`."; exit 1; }
	@$(PYTEST) -m "not parity and not slow" $(ARGS)

slow: $(STAMP)  ## the tests that take minutes each
	@$(PYTEST) -m "slow and not parity" $(ARGS)

parity: $(PARITY)/.installed  ## tests against PyTorch peers, in an environment of their own (torch is large)
	@$(TEST_ENVIRONMENT) $(PARITY)/bin/python -m pytest -n $(WORKERS) --dist loadfile -m "parity and not slow" $(ARGS)

# speechbrain asks for torchaudio, of which no release fits this torch: with it there, transformers fails on import.
$(PARITY)/.installed: $(DEPENDENCIES)
	@$(PYTHON) requirements/install.py $(PARITY) --extra torch
	@$(PARITY)/bin/python -m pip uninstall --quiet --yes torchaudio
	@touch $@

aot: $(PREFLIGHT)/.installed  ## tests that compile for TPUs on this machine, in an environment with libtpu (minutes each)
	@$(TEST_ENVIRONMENT) $(PREFLIGHT)/bin/python -m pytest -n 0 -m aot $(ARGS)

slices: $(PREFLIGHT)/.installed  ## the table of TPU slices, launch/SLICES.md; takes hours, stopped and started at will
	@$(PREFLIGHT)/bin/python -m avlm_jax preflight --config configs/savenvideo.py:size=7b --table launch/SLICES.md \
	  --workdir runs/preflight $(ARGS)

$(PREFLIGHT)/.installed: $(DEPENDENCIES)
	@$(PYTHON) requirements/install.py $(PREFLIGHT) --extra tpu
	@touch $@

format: $(STAMP)  ## let ruff lay out the code and mend what it can
	@$(RUN) -m ruff check --quiet --fix .
	@$(RUN) -m ruff format --quiet .

# uv resolves for Pythons other than the one it runs on. UPGRADE=--upgrade takes newer versions where setup.py allows
# them; without it only what setup.py newly asks for changes. The 3.12 lock also serves newer Pythons; that of
# tensorflow-io's own environment serves 3.11 and 3.12, the last that it has wheels for.
UPGRADE ?=
UV := .cache/uv/bin/uv
lock: $(UV)  ## resolve setup.py's and tfio.in's dependencies into requirements/*.txt again
	@for version in 3.11 3.12; do \
	  $(UV) pip compile setup.py --extra dev --no-config --quiet --generate-hashes $(UPGRADE) \
	    --python-version $$version --python-platform linux --custom-compile-command "make lock" \
	    --output-file requirements/lock-py$$(echo $$version | tr -d .).txt || exit 1; \
	done
	@$(UV) pip compile requirements/tfio.in --no-config --quiet --generate-hashes $(UPGRADE) \
	  --python-version 3.11 --python-platform linux --custom-compile-command "make lock" \
	  --output-file requirements/tfio-py311.txt

$(UV):
	@$(PYTHON) -m venv .cache/uv
	@.cache/uv/bin/python -m pip install --quiet --disable-pip-version-check "uv==0.13.8"

clean:  ## remove environments, caches and build leftovers; runs/ and data stay
	@rm -rf $(VENV) $(PARITY) $(PREFLIGHT) .venv-tfio .cache .pytest_cache .ruff_cache build dist *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
