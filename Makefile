# Two commands: `make demo` and `make test`. Each sets up its own environment in .venv first.
PYTHON ?= python3
PROFILE ?= demo
BIN := .venv/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: demo test test-all lint lab bench reference ship clean

demo: .venv/installed          ## tables 1-3, figures and report.html on the embedded cohort
	$(BIN)/ipmn run params/demo.yaml

test: .venv/tests              ## what every change must pass, in minutes
	$(PYTEST) -m "not slow"

test-all: .venv/tests          ## every test: also kills at more moments, JupyterLab, the demo beside its reference
	$(PYTEST)

lint: .venv/installed          ## style, imports between rooms, notebooks without outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/nbstripout --verify --extra-keys "metadata.papermill cell.metadata.papermill cell.metadata.execution" notebooks/*.ipynb

lab: .venv/installed           ## the notebooks, live
	$(BIN)/jupyter lab notebooks

bench: .venv/installed         ## speed beside the plain pipeline, twenty minutes
	$(BIN)/python benchmarks/bench.py

reference: .venv/installed     ## renew outputs/reference/PROFILE
	$(BIN)/ipmn run params/$(PROFILE).yaml
	$(MAKE) ship

TASKS := runs$(if $(shell grep "^multiclass_models: \[\]" params/$(PROFILE).yaml),/binary)
OWN := $(addprefix outputs/$(PROFILE)/,params.yaml tables $(if $(filter demo,$(PROFILE)),,$(TASKS)))
OWN += $(addprefix outputs/$(PROFILE)/figures/,forest.png cross_site.png strategies.png unseen.png fusion.png dial.png)
OWN += $(if $(filter study,$(PROFILE)),outputs/$(PROFILE)/report.html outputs/$(PROFILE)/figures/figure1.png)

ship:                          ## copy what PROFILE has finished so far to outputs/reference, without weights
	tar cf - --exclude='*.pt' --exclude=share_done --exclude=trained_here --exclude='.*' --exclude='*.md' \
		--exclude='*.tex' --exclude='*_beside_paper.csv' $(wildcard $(OWN) outputs/$(PROFILE)_*/runs) | tar xf - -C outputs/reference --strip-components 1

clean:                         ## remove the environment and all outputs except outputs/reference
	rm -rf .venv $(filter-out outputs/README.md outputs/reference, $(wildcard outputs/*))

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) ".[dev]"
	touch $@

.venv/tests: .venv/installed
	$(INSTALL) ".[dev,flower]"
	touch $@
