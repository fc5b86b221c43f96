# The contributor's loop. `make setup` once; then `make lint test` before each commit.
PYTHON := .venv/bin/python
export OMP_NUM_THREADS ?= 1

.PHONY: setup lint test test-all docs demo

setup:
	python3 -m venv .venv
	.venv/bin/pip install -q -c constraints.txt -e '.[cpu,dev]'

# mypy looks for a folder named as the package is imported; the checkout may have any name.
lint:
	mkdir -p build/mypy && ln -sfn ../.. build/mypy/metagmvae
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

# The mathematics, the data and the command line; nothing that starts Ray, MLflow, a browser or an S3 server.
test:
	$(PYTHON) -m pytest -q -n auto -m 'not (ray or mlflow or browser or s3 or slow or real_data)'

test-all:
	$(PYTHON) -m pytest -q

# Tables of README.md and evaluation/results/README.md from the recorded results.
docs:
	.venv/bin/metagmvae table --write

demo:
	.venv/bin/metagmvae demo
