# A fresh machine needs python3 (3.11 or newer), make and network access for pip; no compiler.
#   make demo              the whole path on the embedded corpus, 2 ranks on the CPU; ARGS=--clean starts it again
#   make test              the test-suite in JOBS processes (2); ARGS='tests/laws -x' and the like choose from it
#   make oracles           comparisons with mergekit and a pretrained MiniLM (83 MB), which it installs
#   make test-cluster      faults on clusters; what needs slurm-wlm munge pdsh openssh-server iproute2 or root says so and skips
#   make check             ruff and mypy
#   make docs              writes the pages and pictures that are made from the code
#   make venv              only the environment that the others use

PYTHON ?= python3
JOBS ?= 2
VENV := .venv
STAMP := $(VENV)/.installed

# mpirun, ninja and deepspeed come from the environment's own bin.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
export VIRTUAL_ENV := $(CURDIR)/$(VENV)

.PHONY: demo test test-cluster oracles check docs venv
.DEFAULT_GOAL := test

demo: $(STAMP)
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python launch/demo.py $(ARGS)

test: $(STAMP)
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

test-cluster: $(STAMP)
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) --dist loadfile -rs tests/cluster $(ARGS)

oracles: $(STAMP)
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install -c constraints.txt -e '.[oracles]'
	DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 python -m pytest tests/oracles tests/test_minilm.py $(ARGS)

check: $(STAMP)
	ruff check
	ruff format --check
	mypy

docs: $(STAMP)
	python docs/generate.py
	python docs/pictures.py

venv: $(STAMP)

# torch goes in first, so that nothing else chooses a build of it. DeepSpeed compiles nothing at installation, and what
# it would compile later is not used on the CPU.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	  "constraints.txt needs Python 3.11 or newer, found " + sys.version.split()[0] + "; name another: make PYTHON=python3.12")'
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt torch
	DS_BUILD_OPS=0 $(VENV)/bin/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@
