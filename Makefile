VENV := .venv
STAMP := $(VENV)/setup-complete
export OMP_WAIT_POLICY := PASSIVE

.DEFAULT_GOAL := help
.PHONY: help setup demo test check bench bench-gpu evidence faults clean setup-libero setup-maniskill test-libero test-maniskill

help: ## List these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-15s %s\n", $$1, $$2 }'

setup: $(STAMP) ## Make .venv with everything in it (PYTHON=... chooses the interpreter)

$(STAMP): pyproject.toml constraints.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" sh scripts/setup.sh
	@touch $@

demo: $(STAMP) ## Teach the small policy its tasks and write the report
	$(VENV)/bin/perennial run demo

test: $(STAMP) ## Run all tests but the long ones
	@sh scripts/setup.sh browser
	$(VENV)/bin/python -m pytest -m "not faults" -n logical --maxprocesses 4 --dist worksteal

setup-libero: .venv-libero/setup-complete ## Make .venv-libero with LIBERO's simulator in it

setup-maniskill: .venv-maniskill/setup-complete ## Make .venv-maniskill with ManiSkill's simulator in it

.venv-%/setup-complete: pyproject.toml constraints.txt scripts/setup.sh
	@PYTHON="$(PYTHON)" sh scripts/setup.sh $*
	@touch $@

test-libero: setup-libero ## Run the tests of LIBERO in its simulator
	.venv-libero/bin/python -m pytest tests/suites/test_libero*.py -n logical --maxprocesses 2 --dist loadfile

test-maniskill: setup-maniskill ## Run the tests of ManiSkill in its simulator
	.venv-maniskill/bin/python -m pytest tests/suites/test_maniskill*.py

check: $(STAMP) ## Lint, formatting and types
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

bench: $(STAMP) ## Run the benchmarks
	$(VENV)/bin/python benchmarks/run.py

bench-gpu: $(STAMP) ## Run the benchmarks of the 7B model on this machine's GPU
	$(VENV)/bin/python benchmarks/gpu.py

evidence: $(STAMP) ## Fill the tables and drawings of docs/evidence from the result files
	$(VENV)/bin/python scripts/evidence.py

faults: $(STAMP) ## Run the long kill-and-resume tests
	$(VENV)/bin/python -m pytest -m faults

clean: ## Remove caches and build leftovers; .venv and runs stay
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info
	find src tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
