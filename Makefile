# make demo    install, train the demo, show where to look
# make test    all tests          make lint    ruff and mypy
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint install

demo: install
	$(BIN)/lightning run recipes/openmoji.yaml
	$(BIN)/lightning show openmoji

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[openmoji,data,compare,test]"
	touch $@
