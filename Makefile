# The commands people type. Each sets up what it needs in .venv and can be repeated or interrupted.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
NEED_GB := 9
export PATH := $(CURDIR)/$(BIN):$(PATH)
# PyTorch's threads sleep while they wait, unless you say otherwise: other programs run beside them
ifndef OMP_WAIT_POLICY
export GOMP_SPINCOUNT ?= 10000
endif
.DEFAULT_GOAL := help
.PHONY: help demo test lab docs exercises readme setup browser gpu quarto

help:  ## what can be done here
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY)  ## the environment alone (the others do it by themselves)

# The stamp is written last, so an interrupted installation is simply continued.
$(READY): settings.ini setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON) is Python %d.%d, but 3.10 or newer is needed: make PYTHON=/path/to/newer/python3" % sys.version_info[:2] or 0)'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv) and run make again"; exit 1; }
	@$(PYTHON) -c 'import os, shutil, sys; free = shutil.disk_usage(".").free / 1e9; need = 1 if os.path.isdir("$(VENV)/lib") else $(NEED_GB); sys.exit(free < need and "the installation needs %d GB of disk, but %.1f GB are free here" % (need, free) or 0)'
	@echo "== setting up $(VENV): PyTorch, faiss, JupyterLab and the kit, about 7 GB; some minutes, once"
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]' || { echo "the installation stopped (network or disk?); run the same command again to continue"; exit 1; }
	@touch $@

demo: $(READY)  ## DeepCluster on embedded digits: one to three minutes, ends in a report
	@echo "== running the first experiment on scikit-learn's digits"
	@deepcluster-nb run train --preset digits --out runs/digits

test: $(READY)  ## every notebook and every test
	@echo "== 1/3 the package and the notebooks say the same"
	@python tests/check_clean.py
	@echo "== 2/3 every chapter runs from top to bottom"
	@OMP_NUM_THREADS=1 nbdev_test --n_workers $$(python -c 'import os; print(os.cpu_count())') --timing --do_print   # a thread a notebook
	@echo "== 3/3 what notebooks can't test"
	@OMP_NUM_THREADS=1 python -m pytest -q -n $$(python -c 'import os; print(os.cpu_count())') --dist loadfile --no-loadscope-reorder --durations 10 tests

lab: $(READY)  ## JupyterLab on the notebooks
	@cd nbs && jupyter lab

docs: quarto $(READY)  ## the book, with Quarto
	@touch README.md   # younger than its notebook: nbdev would have Quarto make it anew, in its own way
	@nbdev_docs
	@echo "== the book is in _docs: open _docs/index.html"

quarto:
	@command -v quarto >/dev/null || { echo "the book is made by Quarto, which is not installed: see https://quarto.org/docs/get-started (or pip install quarto-cli), then run make docs again"; exit 1; }

browser: $(READY)  ## chapter 05 in JupyterLab and a run's report, in a real browser
	@python -c 'import playwright' 2>/dev/null || python -m pip install --disable-pip-version-check -q 'playwright>=1.49,<2'
	@python tests/browser.py --out runs/browser

gpu: $(READY)  ## on a machine with an NVIDIA GPU: its tests and its speed, ten minutes
	@python tests/gpu.py --out runs/gpu

exercises: $(READY)  ## notebooks of the chapters' exercises without the answers, to teach from
	@python exercises/make.py

readme: $(READY)  ## README.md from nbs/index.ipynb
	@jupyter nbconvert --log-level WARN --to markdown --output-dir . --output README \
		--RegexRemovePreprocessor.patterns='#\| hide' nbs/index.ipynb
