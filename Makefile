# `make demo` and `make test` set up all they need on a machine that has Python and make; later calls start at once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
SCRIPTS := moduseg/report/static/main.js moduseg/report/static/lib moduseg/report/static/views

.PHONY: install demo test test-slow lint clean

install: $(READY)

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 14) else f"got Python {v[0]}.{v[1]}, expected 3.10 to 3.13; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	@touch $@

# What the tests and checks need beside the package: Ray, Gradio, faiss, a second CLIP, a browser's driver.
$(DEV): $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/python scripts/build_bank.py
	$(BIN)/python scripts/infer.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/oxlint moduseg/report/static
	$(BIN)/oxfmt --check $(SCRIPTS)

test: lint
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(DEV)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

clean:
	rm -rf $(VENV) build dist outputs
