# Set-up and everyday commands; `make` alone lists them. run, serve and test install first where needed.
#
# Variables: ARGS      more arguments for run and serve, e.g. ARGS="--set training.dpo.beta=0.2"
#            CONFIG    the configuration of run and serve
#            PYTHON    the Python 3.11 to build the environment from
#            LOCK      the set: requirements/cpu.txt, or requirements/gpu.txt for a machine with GPUs
#            INSTALLER uv, which is told what pip's settings say and gives way to pip where it fails; or pip alone
#            PIP_ARGS  more arguments for both. Where no CPU build of torch is on offer a CUDA build is taken: larger,
#                      works too. To avoid it: PIP_ARGS="--extra-index-url <PyTorch's index of CPU wheels>"

PYTHON ?= python3.11
PIP_ARGS ?=
INSTALLER ?= uv
CPU_LOCK := requirements/cpu.txt
GPU_LOCK := requirements/gpu.txt
LOCK ?= $(CPU_LOCK)
CONFIG ?= configs/nano.yaml
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# A finished installation leaves this file. Its name changes with the files that decide what is installed.
STAMP := $(VENV)/.installed-$(shell cat $(LOCK) pyproject.toml | cksum | cut -d ' ' -f 1)

# Commands run with the environment on the PATH: DeepSpeed looks there for ninja, which comes with the environment.
IN_VENV := PATH="$(CURDIR)/$(BIN):$$PATH"
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install lock run serve check test test-all test-gpu lint format typecheck doctor clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: $(STAMP) ## make .venv and install the pinned set; does nothing when that is done

lock: $(STAMP) ## resolve requirements/gpu.txt anew; reads the package index, installs nothing
	$(resolve_gpu)

run: $(STAMP) ## run the whole pipeline on CONFIG
	$(IN_VENV) python -m ray_jobs.pipeline --config $(CONFIG) $(ARGS)

serve: $(STAMP) ## serve the trained model of CONFIG
	$(IN_VENV) python -m ray_jobs.serve --config $(CONFIG) $(ARGS)

check: lint typecheck ## lint, types, and the tests that start no engine: for every change, in minutes
	$(IN_VENV) python -m pytest -m "not slow and not gpu and not engine"

test: lint typecheck ## lint, types, and all tests but the slow ones
	$(IN_VENV) python -m pytest

test-all: lint typecheck ## the same, and the slow tests
	$(IN_VENV) python -m pytest -m "not gpu"

test-gpu: $(STAMP) ## the tests that need a CUDA GPU
	$(IN_VENV) python -m pytest -m gpu

lint: $(STAMP) ## style and likely mistakes
	$(IN_VENV) ruff check .
	$(IN_VENV) ruff format --check .

format: $(STAMP) ## put the code into the house format, and fix what fixes itself
	$(IN_VENV) ruff check --fix .
	$(IN_VENV) ruff format .

typecheck: $(STAMP) ## types
	$(IN_VENV) mypy

doctor: $(STAMP) ## check this machine
	$(IN_VENV) psycho doctor

clean: ## delete caches; .venv and runs stay
	@echo "Deleting caches: build, *.egg-info, .mypy_cache, .pytest_cache, .ruff_cache, .hypothesis, __pycache__."
	@rm -rf build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -type d -name __pycache__ -print0 | xargs -0 rm -rf
	@echo "Kept: $(VENV) and runs."

# torch first and with its dependencies: a CUDA build needs its nvidia-* packages. The rest without: see $(LOCK).
# No build isolation, so that what has to be built (DeepSpeed, psycho) is built with the pinned setuptools.
$(STAMP):
	@$(find_python); $(check_headers); $(check_compiler); $(make_venv)
	@$(if $(filter pip,$(INSTALLER)),$(with_pip),$(with_uv) || { echo "$(pip_goes_on)"; $(with_pip); })
	$(build_operator)
	@rm -f $(VENV)/.installed-*
	@touch $@

pip_install := $(BIN)/python -m pip install $(PIP_ARGS)
uv_install := $(BIN)/python requirements/uv.py install --compile-bytecode --python $(BIN)/python $(PIP_ARGS)

define install_set
$(1) --constraint $(LOCK) torch setuptools && \
$(1) --no-deps --no-build-isolation --requirement $(LOCK) && \
$(1) --no-deps --no-build-isolation --editable .
endef

# uv is through in less than half of pip's time. Whatever it stumbles over is left to pip, which goes on from what is there.
with_pip = $(call install_set,$(pip_install))
with_uv = $(pip_install) --quiet --constraint $(LOCK) uv && $(call install_set,$(uv_install))
pip_goes_on = uv did not install the set (see above), so pip does.

# What the CPU set holds is held here as well, wherever a CUDA package does not want another version: uv keeps the
# versions that it finds in its output. Wheels must run on glibc 2.31. The comment on top is kept.
# uv is asked as it is, so that wheels which pip is told of on this machine (torch for the CPU) stay out.
define resolve_gpu
lock=$$(mktemp -d) && cp $(CPU_LOCK) $$lock/gpu.txt && grep '^setuptools==' $(CPU_LOCK) > $$lock/build.txt && \
$(BIN)/uv pip compile pyproject.toml --extra gpu --extra dev --constraint $$lock/build.txt \
	--python-version 3.11 --python-platform x86_64-manylinux_2_31 --no-header --no-annotate --quiet \
	--no-emit-index-url --output-file $$lock/gpu.txt > /dev/null && \
sed '/^[^#]/,$$d' $(GPU_LOCK) > $$lock/top.txt && cat $$lock/top.txt $$lock/gpu.txt > $(GPU_LOCK); \
status=$$?; rm -r $$lock; exit $$status
endef

# DeepSpeed compiles its CPU operator when it is first used, in its own cache; the first run need not wait for that.
define build_operator
-$(IN_VENV) DS_ACCELERATOR=cpu python -c \
	"from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder as op; op().load(verbose=False)" >/dev/null
endef

# Each check ends in one sentence a person can act on.
fail = { echo "$(1)" >&2; exit 2; }
why_compile = is needed (DeepSpeed builds a C++ operator on first use) and was not found:

define find_python
for python in "$(PYTHON)" python3 python ""; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null && break; \
done; \
[ -n "$$python" ] || $(call fail,Python 3.11 is needed and was not found: install it or pass PYTHON=/path/to/python3.11.)
endef

define check_headers
"$$python" -c 'import sys, sysconfig as s; open(s.get_path("include") + "/Python.h")' 2>/dev/null || \
	$(call fail,Python.h $(why_compile) install python3.11-dev or what your system calls it.)
endef

define check_compiler
command -v "$${CXX:-c++}" >/dev/null || \
	$(call fail,A C++ compiler $(why_compile) install g++ or name yours with CXX.)
endef

define make_venv
[ -x $(BIN)/pip ] || "$$python" -m venv $(VENV) || \
	$(call fail,Python cannot make a virtual environment: install python3.11-venv or what your system calls it.)
endef
