# make demo    install, train the demo, show where to look
# make test    all tests          make lint    ruff and mypy
# make faults  kill one of two ranks twenty times, and compare with a run left alone (a quarter of an hour)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test faults lint install

demo: install
	$(BIN)/lightning run recipes/openmoji.yaml
	$(BIN)/lightning show openmoji

test: install
	$(BIN)/python -m pytest

faults: install
	$(BIN)/python tests/nami_lightning/kill_ranks.py --kills 20

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[openmoji,data,evaluate,test]"
	touch $@
