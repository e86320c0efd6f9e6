# `make help` lists the targets. All of them run in $(VENV), which is set up again only when setup.py, pyproject.toml,
# constraints.txt or the package's version change.

PYTHON ?= python3
VENV ?= .venv
PHOTO ?= docs/photos/coffee.jpg
DEMO ?= build/demo
PAIR ?= torch==2.15.0 triton==3.9.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
REQUIREMENTS := setup.py pyproject.toml constraints.txt tinysr_kernels/_version.py
NAME := $(basename $(notdir $(PHOTO)))
OTHER_TRITON := $(addprefix build/triton-,$(TRITON))

# Two pytest workers with one thread each: the tests are many and small, so intra-op threads cost more than they gain.
WORKERS := -n 2 --dist loadfile --no-loadscope-reorder --benchmark-disable
PYTEST_ARGS ?= $(WORKERS) -m "not mutation and not long"

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test quick long mutations processors pair fuzz lint audit static predicted standin tables benchmarks cpu-benchmarks \
    docs examples format wheel check-wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.ready-runtime ## upscale a photograph with the bundled checkpoint
	@mkdir -p $(DEMO)
	$(BIN)/tinysr upscale $(PHOTO) -o $(DEMO)/$(NAME).png --model demo
	@$(BIN)/python docs/photos/side_by_side.py $(PHOTO) $(DEMO)/$(NAME).png $(DEMO)/$(NAME)-side-by-side.png
	@echo "upscaled:     $(DEMO)/$(NAME).png"
	@echo "side by side: $(DEMO)/$(NAME)-side-by-side.png  (input, bicubic x4, this model)"

# A selection of tests that takes a minute: the rules for every file, operators in float32 against their float64
# references, some operators' kernels, families, launch configurations, a checkpoint from file to image.
QUICK := tests/test_house.py tests/families tests/launch tests/ops/norm tests/ops/linear tests/ops/conv/test_conv3x3.py \
    tests/ops/conv/test_sepconv.py tests/ops/conv/test_sepconv_kernel.py tests/ops/attention/test_attention.py \
    tests/runtime/test_compiled.py::test_one_by_one_equals_the_batch

test quick long mutations processors fuzz: export OMP_NUM_THREADS ?= 1
test: $(VENV)/.ready-test ## run the tests (PYTEST_ARGS="-n 0 tests/test_house.py" runs a subset)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

quick: $(VENV)/.ready-test ## run a one-minute selection of the tests
	$(BIN)/python -m pytest $(WORKERS) -k "numeric and not float16 or test_house or test_compiled or families or launch" $(QUICK)

long: $(VENV)/.ready-test ## tests that take too long for `make test`: the tutorial, whole networks, compression
	$(BIN)/python -m pytest $(WORKERS) -m "long and not mutation"

mutations: $(VENV)/.ready-test ## mutation tests: every mutated kernel must make a test fail
	$(BIN)/python -m pytest $(WORKERS) -m mutation

processors: $(VENV)/.ready-test ## numeric tests with smaller instruction sets, and with two threads
	$(BIN)/python -m tests.processors

fuzz: $(VENV)/.ready-test ## 3,000 cases of each fuzzer (FUZZ_ARGS="images --cases 100" runs some); the report goes to build
	@mkdir -p build
	$(BIN)/python -m tests.fuzz --out build/fuzz.json $(FUZZ_ARGS)

pair: ## test another pair of PyTorch and Triton (PAIR="torch==2.9.1 triton==3.5.1 numpy==2.3.5")
	$(PYTHON) .ci/pair.py $(PAIR)

lint: $(VENV)/.ready-dev ## check formatting, ruff rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# In an environment of its own, because it needs nothing of this project. Its versions are those of constraints.txt too.
audit: build/audit/.ready ## ask the public databases of advisories about every pin and every floor; needs the network
	build/audit/bin/python .ci/audit.py

static: $(VENV)/.ready-test $(addsuffix /.ready,$(OTHER_TRITON)) ## compile and check kernels for every architecture (TRITON=3.6.0: with that Triton)
	@mkdir -p build
	$(BIN)/python -m benchmarks static $(addprefix --triton ,$(OTHER_TRITON)) $(STATIC_ARGS) > build/static.txt || \
	    { tail -n 1 build/static.txt; exit 1; }
	@tail -n 1 build/static.txt

predicted: $(VENV)/.ready-test ## predict the time of all launches from their machine code and hold it to its bars; needs a C++ compiler
	$(BIN)/python -m benchmarks predict --check > /dev/null

standin: export OMP_NUM_THREADS ?= 1
standin: $(VENV)/.ready-test $(addsuffix /.ready,$(OTHER_TRITON)) ## run the families on a stand-in for a GPU (TRITON=3.6.0: with that Triton)
	$(BIN)/python -m tests.standin $(addprefix --triton ,$(OTHER_TRITON)) --sizes few

tables: ## regenerate benchmarks/results/, docs/kernels.md and docs/plan.md
	$(MAKE) static STATIC_ARGS=--keep
	$(MAKE) static STATIC_ARGS=--keep TRITON=3.6.0
	$(BIN)/python -m benchmarks predict --keep
	$(BIN)/python -m benchmarks pages

benchmarks: $(VENV)/.ready-dev ## run all benchmarks (9 minutes on a GPU); results go to build/benchmarks
	$(BIN)/python -m benchmarks all --out build/benchmarks

cpu-benchmarks: export OMP_NUM_THREADS ?= 1
cpu-benchmarks: $(VENV)/.ready-test ## speedups over eager PyTorch on this CPU, compared with their lower bounds
	@mkdir -p build
	$(BIN)/python -m benchmarks cpu --json build/cpu.json

docs: $(VENV)/.ready-docs ## build the documentation site in build/docs; warnings are errors
	rm -rf build/docs
	$(BIN)/python -m sphinx -b html -c docs -d build/doctrees -W --keep-going -n -q . build/docs
	@echo "documentation: build/docs/index.html"

examples: $(VENV)/.ready-test ## run all files in examples/; results go to build/examples
	@set -e; for file in examples/*.py; do echo "$$file"; $(BIN)/python $$file; done

format: $(VENV)/.ready-dev ## format the sources and apply ruff's fixes
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

wheel: $(VENV)/.ready-dev ## build the wheel into dist/
	rm -rf dist build/lib build/bdist.*
	$(BIN)/python -m build --wheel --no-isolation --outdir dist .

check-wheel: wheel ## build the wheel, check its contents, test it in a new environment
	$(PYTHON) .ci/check_wheel.py dist/*.whl
	PYTHON=$(PYTHON) .ci/check_install.sh dist/*.whl

clean: ## remove all build outputs except $(VENV)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 15))' || { \
	    echo "$(PYTHON) is missing or not Python 3.11 to 3.14; name another: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	    echo "cannot create $(VENV): Debian and Ubuntu keep venv apart (apt-get install python3-venv)" >&2; exit 1; }
	@$(PIP) pip # the one that comes with Python has known faults

# torch is installed first, on its own: constraints.txt explains why.
$(VENV)/.ready-runtime: $(REQUIREMENTS) | $(BIN)/python
	@echo "setting up $(VENV): a few minutes when the packages are not in pip's cache"
	$(PIP) torch
	$(PIP) -e .
	@touch $@

$(VENV)/.ready-test: $(VENV)/.ready-runtime
	$(PIP) -e '.[test]'
	@touch $@

$(VENV)/.ready-docs: $(VENV)/.ready-runtime
	$(PIP) -e '.[docs]'
	@touch $@

build/audit/.ready: constraints.txt
	@$(PYTHON) -m venv --clear build/audit
	@build/audit/bin/python -m pip install --disable-pip-version-check --quiet -c constraints.txt pip-audit
	@touch $@

# Another Triton, next to the installed one, for ahead-of-time compilation only.
build/triton-%/.ready: $(VENV)/.ready-test
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --target $(@D) triton==$*
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready-test
	$(PIP) -e '.[dev,train]'
	@touch $@
