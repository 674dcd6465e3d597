# make results   set up and run the notebooks: every table and figure (PROFILE=smoke, cpu, wikitext2)
# make test      set up and check everything
# make fuzz      set up and try twenty times as many arguments as the tests do, others each time
# make grid      set up and run a small grid of studies that is killed and goes on, minutes
# make notebooks set up and run every notebook by hand with a changed parameter, minutes
# make lab       set up and open JupyterLab
# make clean     remove the environment, caches and executed notebooks; results stay

PROFILE ?= cpu
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
FUZZED := tests/test_arguments.py tests/test_checked.py tests/test_command_line.py

.PHONY: results test fuzz grid notebooks lab clean

results: .venv/ready
	$(BIN)/python -m earlyexit run --profile $(PROFILE)

test: .venv/ready
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/nbstripout --verify --keep-id $(NOTEBOOKS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

fuzz: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --hypothesis-profile=fuzz --dist load $(FUZZED)

grid: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m grid -n 0 tests/test_workflow.py

notebooks: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m notebooks -n 0 tests/test_notebooks.py

lab: .venv/ready
	$(BIN)/jupyter lab notebooks

clean:
	rm -rf .venv .cache .snakemake build *.egg-info .pytest_cache .ruff_cache .hypothesis

.venv/ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c requirements.lock -e ".[dev]"
	touch $@
