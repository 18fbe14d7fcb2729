# The two commands: `make table1` runs the main job, `make test` the tests. Both set up what they need.

# The newest interpreter found; `make test PYTHON=python3.12` chooses another one.
PYTHON ?= $(shell .ci/pythons | head -n 1)
VENV ?= .venv
BIN := $(VENV)/bin

# XLA asks for its temporary arrays anew at every step. Kept by glibc instead of given back to the system, they
# need not be cleared each time: a training step on two cores is a tenth shorter.
export MALLOC_MMAP_THRESHOLD_ := 2000000000
export MALLOC_TRIM_THRESHOLD_ := 4000000000
export MALLOC_TOP_PAD_ := 268435456

.PHONY: table1 test test-pythons lint parity speed clean-venv

table1: $(VENV)/.run
	$(BIN)/python -m experiments.table1 --preset=mini --workdir=runs/table1_mini

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Every interpreter found, and the oldest versions on the oldest one: ten minutes and more for each.
test-pythons:
	.ci/test_pythons

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

parity: $(VENV)/.parity
	$(BIN)/python -m checks.parity --output=runs/parity

speed: $(VENV)/.speed
	$(BIN)/python -m benchmarks.speed --preset=cpu --output=runs/speed

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "no Python 3.11 to 3.14 was found; install one, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' \
	  || { echo "$(PYTHON) is not a Python from 3.11 to 3.14; name another one: make PYTHON=/path/to/python3"; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

$(VENV)/.run: requirements.txt pyproject.toml | $(VENV)/bin/python
	@start=$$(date +%s); $(BIN)/python -m pip install --quiet -e . \
	  && echo "installed in $$(( $$(date +%s) - start )) seconds"
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@start=$$(date +%s); $(BIN)/python -m pip install --quiet -e '.[test]' \
	  && echo "test tools installed in $$(( $$(date +%s) - start )) seconds"
	@touch $@

$(VENV)/.parity: $(VENV)/.run
	@start=$$(date +%s); $(BIN)/python -m pip install --quiet -e '.[parity]' \
	  && echo "torch and torchvision installed in $$(( $$(date +%s) - start )) seconds"
	@touch $@

$(VENV)/.speed: $(VENV)/.parity
	@$(BIN)/python -m pip install --quiet -e '.[fast]'
	@touch $@

clean-venv:
	rm -rf $(VENV)
