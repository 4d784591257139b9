PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-peers lint format bench bench-lean clean

help:
	@echo "make demo    train a small network on handwritten digits (ARGS=--help for its options)"
	@echo "make test    all tests and every example in the documentation"
	@echo "make test-peers  the installed torch and optax beside adamfn, live (installs torch)"
	@echo "make lint    ruff and pyright"
	@echo "make format  let ruff rewrite what it can"
	@echo "make bench   measure exactness, tracing and a step's speed, beside optax and torch, and draw"
	@echo "             the README's tables from the results (installs torch in an environment of its"
	@echo "             own; about 15 minutes, 16 GB)"
	@echo "make bench-lean  measure moments in fewer bytes, beside torchao and bitsandbytes (installs"
	@echo "             them in an environment of their own; about 40 minutes)"
	@echo "make clean   remove the virtual environment and what was built"

demo: $(VENV)/.examples
	@$(BIN)/python examples/digits.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto $(ARGS)

test-peers: $(VENV)/.peers
	$(BIN)/python -m pytest -q -n auto tests/peers $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)-bench/.bench
	$(VENV)-bench/bin/python benchmarks/exactness.py
	$(VENV)-bench/bin/python benchmarks/trace_cost.py
	$(VENV)-bench/bin/python benchmarks/step_speed.py $(ARGS)
	$(VENV)-bench/bin/python benchmarks/monitor_cost.py
	$(VENV)-bench/bin/python benchmarks/readme_tables.py

bench-lean: $(VENV)-lean/.lean
	$(VENV)-lean/bin/python benchmarks/lean_fidelity.py $(ARGS)
	$(VENV)-lean/bin/python benchmarks/lean_speed.py
	$(VENV)-lean/bin/python benchmarks/lean_quality.py
	$(VENV)-lean/bin/python benchmarks/readme_tables.py

# One stamp for each extra, so that an extra is installed once and again when it changes.
$(VENV)/.% $(VENV)-bench/.% $(VENV)-lean/.%: pyproject.toml
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) $(VENV)-bench $(VENV)-lean build dist out .ruff_cache .hypothesis
