# Two commands: `make demo` and `make test`. Each sets up its own environment in .venv first.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint lab bench reference clean

demo: .venv/installed          ## tables 1-3, figures and report.html on the embedded cohort
	$(BIN)/ipmn run params/demo.yaml

test: .venv/extras             ## the whole test suite, with the backends that only it needs
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/installed          ## what .ci/run checks before the tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution" notebooks/*.ipynb

lab: .venv/installed           ## the notebooks, live
	$(BIN)/jupyter lab notebooks

bench: .venv/installed         ## speed beside the plain pipeline, twenty minutes
	$(BIN)/ipmn bench

reference: demo                ## outputs/reference anew, from this machine's demo
	cp $(addprefix outputs/demo/, tables/table1.csv tables/table2.csv tables/table3.csv figures/figure1.png report.html) outputs/reference/

clean:                         ## everything that was written, but for the reference results
	rm -rf .venv $(filter-out outputs/README.md outputs/reference, $(wildcard outputs/*))

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]" --constraint constraints.txt
	touch $@

.venv/extras: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev,dask,ray,flower,privacy,viewer]" --constraint constraints.txt
	touch $@
