# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Two workers with a thread each: many of the tests build small things, which more threads do not speed up. Each has half
# of the tests, in their order, so that what a file's tests share is built once; who is done takes from the other's end.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest
WORKERS := -n 2 --dist worksteal
# TensorRT-RTX builds in a process of its own, as a user's does: beside every other runtime and dozens of compiled
# packages in one process it crashed once, which could not be repeated.
ALONE := tests/runtimes/test_nvinfer.py
MARKED := not slow

.PHONY: demo test test-slow test-all most alone test-lowest test-light lint schema reference tables docs clean

demo: .venv/.installed
	$(BIN)/python scripts/demo.py

# Every module, without the tests that are marked `slow`.
test: .venv/.installed-dev
	$(MAKE) --no-print-directory --jobs 2 most alone

# The rest: every width, type and format, whole processes, and models that take seconds.
test-slow: .venv/.installed-dev
	$(MAKE) --no-print-directory --jobs 2 most alone MARKED=slow

test-all: test-light test test-slow

most:
	$(PYTEST) $(WORKERS) -m "$(MARKED)" --ignore $(ALONE)

alone:  # beside `most`, whose lines it does not mix with its own
	@mkdir -p build
	@$(PYTEST) -p no:cacheprovider -m "$(MARKED)" $(ALONE) > build/alone.txt 2>&1; code=$$?; cat build/alone.txt; exit $$code

# The fast tests with the lowest versions that pyproject.toml states, on the oldest Python and on a new one.
test-lowest:
	scripts/check_lowest 3.10
	scripts/check_lowest 3.13

# The base installation alone: its size, an image classified without a compiler, and the tests that need no more.
test-light:
	scripts/check_light $(PYTHON)

lint: .venv/.installed-dev
	scripts/check

# The published JSON schema of manifest.json; `make lint` refuses a stale one.
schema: .venv/.installed-dev
	$(BIN)/python scripts/make_schema.py docs/manifest.schema.json

# The reference pages that follow from the code; `make lint` refuses stale ones.
reference: .venv/.installed-dev
	$(BIN)/python scripts/make_reference.py

# The pages' tables and pictures, from the committed results; `make lint` refuses stale ones.
tables: .venv/.installed-dev
	$(BIN)/python scripts/make_tables.py
	$(BIN)/python scripts/make_pictures.py

# The site, in build/site. A link that leads nowhere is an error.
docs: .venv/.installed-dev
	$(BIN)/zensical build --clean --strict

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable '.[export,openvino]' --constraint constraints.txt
	touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/pip install --quiet --editable '.[dev]' --constraint constraints.txt
	touch $@

clean:
	rm -rf build .cache .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
