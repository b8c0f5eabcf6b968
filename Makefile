# Two commands for a fresh machine: `make demo` and `make test`. Each makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes of the test suite; each computes with one thread, or waits for processes that it has started.
JOBS ?= 3
# glibc gives large buffers back to the kernel at every step; keeping them makes CPU training up to twice as fast.
export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
export MALLOC_TRIM_THRESHOLD_ ?= 8589934592

.PHONY: demo test lint clean clean-runs

demo: $(VENV)/installed
	$(BIN)/python -m diffusion2gan demo --out runs/demo

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=20

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# `installed` is made last. A first install that fails leaves nothing; a later one that fails (offline after a change of
# pyproject.toml, say) leaves the environment that worked.
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is $$($(PYTHON) -V 2>&1), expected Python 3.11 to 3.13; run make PYTHON=python3.12, say"; exit 2; }
	@test -e $(VENV)/complete || { rm -rf $(VENV) && $(PYTHON) -m venv $(VENV); }
	@echo "installing into $(VENV) (about 3 minutes the first time)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]' || \
	  { test -e $(VENV)/complete || rm -rf $(VENV); exit 1; }
	@touch $(VENV)/complete $@

# The environment and what tools cached; runs and pair stores stay.
clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything that was simulated and trained below runs/.
clean-runs:
	rm -rf runs
