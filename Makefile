# `make setup` once, then `make lint test` before each commit.
PYTHON := .venv/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: setup lint types test test-all mutation docs demo

setup:
	python3 -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[all,dev]'

lint: types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# mypy needs a folder with the import name of the package, and the checkout may have any name.
types:
	mkdir -p build/mypy && ln -sfn ../.. build/mypy/metagmvae
	.venv/bin/mypy

# Everything that needs neither Ray, MLflow, a browser, an S3 server nor real datasets; about three minutes on 2 cores.
test:
	$(PYTHON) -m pytest -q -n auto -m 'not (ray or mlflow or browser or s3 or slow or real_data)'

# Tests with a Ray cluster run one by one: each cluster takes all cores.
test-all:
	$(PYTHON) -m pytest -q -n auto -m 'not (ray or real_data)'
	$(PYTHON) -m pytest -q -m 'ray or real_data'

# Do the tests notice wrong formulas and wrong data? Takes 10 to 20 minutes.
mutation:
	$(PYTHON) tests/mutation.py

# Tables of README.md and the pages in evaluation/results from the recorded results.
docs:
	.venv/bin/metagmvae table --write

demo:
	.venv/bin/metagmvae demo
