# make demo    install, train the demo, show where to look
# make test    all tests          make lint    ruff and mypy
# make docs    the site of docs/, into site/
# make faults  kill -9 of a rank, a run, a preparation, twenty times each, compared with those left alone (20 minutes)
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test faults lint docs install

demo: install
	$(BIN)/lightning run recipes/openmoji.yaml
	$(BIN)/lightning show openmoji

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

faults: install
	PYTHONPATH=tests $(BIN)/python tests/faults/kill_ranks.py --kills 20
	NAMI_KILLS=20 $(BIN)/python -m pytest tests -k kill_9_at_random_points

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

install: .venv/installed

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -e ".[openmoji,data,compare,evaluate,docs,test]"
	touch $@
