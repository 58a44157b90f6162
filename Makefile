# `make demo` and `make test` set up all they need on a machine that has Python and make; later calls start at once.
PYTHON ?= python3
# `make test CONSTRAINTS=oldest` takes the lowest versions that pyproject.toml allows, in an environment of their own.
CONSTRAINTS ?= tested
VENV   := .venv$(if $(filter oldest,$(CONSTRAINTS)),-oldest)
LIMITS_tested := constraints.txt
LIMITS_oldest := constraints-oldest.txt
LIMITS := $(or $(LIMITS_$(CONSTRAINTS)),$(error CONSTRAINTS: got $(CONSTRAINTS), expected tested or oldest))
BIN    := $(VENV)/bin
READY  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
SCRIPTS := moduseg/report/static/main.js moduseg/report/static/lib moduseg/report/static/views moduseg/app/static/app.js

VERSION := import sys; print("%d.%d" % sys.version_info[:2])

.PHONY: same-python install demo test test-slow soak lint docs clean

install: $(READY)

# Another Python than the one that an environment was made with would be ignored without a word.
same-python:
ifeq ($(origin PYTHON),command line)
	@test ! -x $(BIN)/python || test "$$($(PYTHON) -c '$(VERSION)')" = "$$($(BIN)/python -c '$(VERSION)')" || { \
	  echo "PYTHON: got Python $$($(PYTHON) -c '$(VERSION)'), expected that of $(VENV), $$($(BIN)/python -c '$(VERSION)');" \
	    "try: make VENV=$(VENV)-$$($(PYTHON) -c '$(VERSION)') ..., or make clean first"; exit 1; }
endif

$(READY): pyproject.toml $(LIMITS) | same-python
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 10) <= v < (3, 14) else f"got Python {v[0]}.{v[1]}, expected 3.10 to 3.13; try: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint $(LIMITS) --editable .
	@touch $@

# What the tests and checks need beside the package: Ray, Gradio, faiss, a second CLIP, a browser's driver.
$(DEV): $(READY)
	$(BIN)/python -m pip install --quiet --constraint $(LIMITS) --editable ".[dev]"
	@touch $@

demo: $(READY)
	$(BIN)/python scripts/build_bank.py
	$(BIN)/python scripts/infer.py

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/oxlint moduseg/report/static moduseg/app/static
	$(BIN)/oxfmt --check $(SCRIPTS)

# Linters judge the source, so the oldest versions of them would only say less.
test: $(if $(filter oldest,$(CONSTRAINTS)),$(DEV),lint)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 -m "not slow"

test-slow: $(DEV)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m slow

# Half an hour of accidents: kills, full disks, damaged files, two runs at once; then 10,000 mutilated inputs.
# `make soak MINUTES=5 SEED=7` repeats those of a log.
MINUTES ?= 30
soak: $(DEV)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.soak --minutes $(MINUTES) $(if $(SEED),--seed $(SEED))
	HF_HUB_OFFLINE=1 MODUSEG_MUTILATED=345 $(BIN)/python -m pytest -q -n 2 tests/test_mutilated.py

# The documentation as a site, build/site/index.html; a link that leads nowhere ends it.
docs: $(DEV)
	$(BIN)/python docs/site/gather_pages.py build/site_pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict -f docs/site/mkdocs.yml

clean:
	rm -rf $(VENV) build dist outputs
