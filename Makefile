# What a person needs, and nothing else: `make` alone lists it. Everything happens in .venv; nothing is installed outside.
#
#   PYTHON   the interpreter that makes .venv (3.10 to 3.13)
#   TORCH    what pip installs first; pip's options may follow: TORCH="torch==2.11.0 ..."
#   PY       an interpreter to use as it is: nothing is created or installed (`make gpu PY=python3`)
#   STEPS    steps of each of the two runs of `make train`

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
STEPS ?= 300
EXTRAS := dev,report,text

ifeq ($(origin PY),undefined)
PY := $(CURDIR)/$(VENV)/bin/python
INSTALLED := $(VENV)/.installed
endif

# Two ranks share the machine, so each gets half of its cores.
TORCHRUN := OMP_NUM_THREADS=$(shell echo $$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 ))) \
	$(PY) -m torch.distributed.run --standalone --nproc-per-node 2
PRETRAIN := $(TORCHRUN) -m msamp_like.launchers.pretrain --preset tiny --steps $(STEPS) --overwrite

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install train test lint format gpu bench gates nightly clean distclean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

train: $(INSTALLED) ## train a small GPT at O2 and at O0 on two processes; plot and compare
	$(PRETRAIN) --level O2 --out runs/train/O2
	$(PRETRAIN) --level O0 --out runs/train/O0
	$(PY) -m msamp_like.launchers.compare runs/train/O2 runs/train/O0 --out runs/train/loss.png

test: lint ## linter, type checker and the whole suite: at most 10 minutes on two cores
	$(PY) -m pytest --durations=15

# The type checker sees the tree as it is installed: only there is optim/ called msamp_like.optim.
TYPES := build/types
lint: $(INSTALLED) ## linter and type checker alone
	$(PY) -m ruff check .
	@rm -rf $(TYPES) && mkdir -p $(TYPES)/msamp_like
	@ln -s $(CURDIR)/msamp_like/* $(CURDIR)/optim $(CURDIR)/comm $(CURDIR)/launchers $(TYPES)/msamp_like
	cd $(TYPES) && $(PY) -m mypy --config-file $(CURDIR)/setup.cfg --cache-dir $(CURDIR)/.mypy_cache

format: $(INSTALLED) ## let the linter fix and format what it can
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

gpu: $(INSTALLED) ## GPU tests and benchmarks; skipped with a word where there is no CUDA device
	@if $(PY) -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; then \
	    $(PY) -m pytest tests/gpu && $(PY) -m benchmarks.gpu && $(PY) -m benchmarks.blocks; \
	else \
	    echo "make gpu: PyTorch sees no CUDA device here, nothing to run"; \
	fi

BENCHMARKS ?= products casts fused recipes grouped invariance optimizer activation_memory offload attention muon moments \
	accumulation resume overlap step state scales wire zero sequence_bytes tensor_parallel_scales reduction_error scale network
bench: $(INSTALLED) ## every CPU figure but the gates' again (an hour); BENCHMARKS="products scales" for some
	@set -e; for name in $(BENCHMARKS); do echo "== $$name"; $(PY) -m benchmarks.$$name; done
	$(PY) -m benchmarks.summary

gates: $(INSTALLED) ## the loss of every level and recipe against O0, over three seeds (two hours)
	$(PY) -m benchmarks.loss_gap --continue
	$(PY) -m benchmarks.loss_gap_sharded
	$(PY) -m benchmarks.summary

nightly: $(INSTALLED) ## the tests that take minutes or hours
	$(PY) -m pytest -m nightly

install: $(INSTALLED) ## create .venv and install into it; the others do it by themselves

# torch comes first and by itself: an exact version, so that no later requirement moves it.
$(VENV)/.torch:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; \
	(3, 10) <= v or sys.exit("needs Python 3.10 to 3.13, %s is %d.%d; choose another: make PYTHON=python3.12" % (sys.executable, *v)); \
	v <= (3, 13) or print("note: Python %d.%d is untested (3.10 to 3.13 are); choose another: make PYTHON=python3.12" % v)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --disable-pip-version-check $(TORCH)
	$(VENV)/bin/python -m pip install --disable-pip-version-check "setuptools>=77" wheel
	@touch $@

# Without build isolation: an isolated build environment would download its own tools, and the extension needs none.
$(VENV)/.installed: $(VENV)/.torch setup.cfg setup.py pyproject.toml $(wildcard msamp_like/kernels/*.cpp msamp_like/kernels/*.h)
	$(VENV)/bin/python -m pip install --disable-pip-version-check --no-build-isolation -e ".[$(EXTRAS)]"
	@touch $@

clean: ## delete build products and caches, keep .venv and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +

distclean: clean ## clean, and delete .venv and runs too
	rm -rf $(VENV) runs
