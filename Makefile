# make demo    install, train the demo, show where to look
# make test    all tests          make lint    ruff and mypy
# make gpu     the tests that need a GPU, and a report of what it does (gpu/report.md)
# make docs    the site of docs/, into site/
# make fuzz    ten thousand inputs of chance, counted: a right result or one clear error (5 minutes)
# make faults  kill -9 of a rank, a run, a preparation, twenty times each, compared with those left alone (20 minutes)
PYTHON ?= python3
BIN := .venv/bin

# Eight minutes on a GPU of 80 GB. Without a GPU the tests are skipped, and the report is that of the stand-in.
.PHONY: demo test gpu fuzz faults lint docs install

demo: install
	$(BIN)/lightning run recipes/openmoji.yaml
	$(BIN)/lightning show openmoji

test: install
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

gpu: install
	$(BIN)/python -m pytest -m gpu
	$(BIN)/lightning bench gpu --output gpu/report.md

fuzz: install
	$(BIN)/python tests/fuzz/run_fuzz.py --cases 10000

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
