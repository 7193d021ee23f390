# All targets run in .venv. `make .venv` makes it if it is missing, updates it if pyproject.toml or the lock has changed, and
# otherwise does nothing. It needs only Python >= 3.11.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: .venv demo demo-ppo bench bench-algorithms test test-slow test-families lint format docs size lock clean help

# cpu or gpu; by default that of the existing .venv, else cpu
EXTRA ?= $(or $(shell sed -n 's/^extra //p' .venv/.current 2>/dev/null),cpu)
LOCK := requirements/$(EXTRA).lock
# Groups of tests (tests/conftest.py) run in parallel, more than there are CPUs: a whole run often waits for processes to start.
WORKERS ?= 3
PYTEST = pytest -n $(WORKERS) --dist loadgroup --no-loadscope-reorder --durations 30

export PATH := $(CURDIR)/.venv/bin:$(PATH)
export UV_HTTP_TIMEOUT ?= 300
# uv does not read pip's variable. Without it the CPU build of torch comes from PyTorch's own index.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
else ifeq ($(EXTRA),cpu)
TORCH_CPU := --torch-backend=cpu
endif

# .venv/.current is written last and removed first: after an interrupted install it is missing, and the next one starts from scratch.
.venv:
	@[ -f $(LOCK) ] || { echo "EXTRA=$(EXTRA): there is no $(LOCK); use EXTRA=cpu or EXTRA=gpu" >&2; exit 1; }
	stamp="$$(printf 'path %s\nextra %s\n' "$$PWD" $(EXTRA); cksum pyproject.toml $(LOCK))"
	if [ -x .venv/bin/python ] && [ "$$(cat .venv/.current 2>/dev/null)" = "$$stamp" ]; then exit 0; fi
	if [ ! -x .venv/bin/python ] || [ "$$(head -n 1 .venv/.current 2>/dev/null)" != "path $$PWD" ]; then
		rm -rf .venv
		for python in python3.11 python3.12 python3.13 python3 python none; do
			"$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && break
		done
		[ "$$python" != none ] || { echo "rlvid needs Python 3.11, 3.12 or 3.13 on the PATH; found none" >&2; exit 1; }
		"$$python" -m venv .venv
	fi
	rm -f .venv/.current
	.venv/bin/python -m pip install --quiet --constraint $(LOCK) uv
	install="uv pip install --quiet --python .venv/bin/python --no-deps"
	$$install $(TORCH_CPU) $$(grep -E '^torch(vision)?==' $(LOCK))  # first and alone: PyTorch's index has its own triton
	$$install --exact --requirements $(LOCK)
	$$install --no-build-isolation --editable .
	# With PYTHONDONTWRITEBYTECODE each of the dozen processes of a run would compile torch again: 2 s of its 3 s start.
	.venv/bin/python -m compileall -q -j 0 .venv/lib >/dev/null || true  # some packages ship files that do not compile
	echo "$$stamp" > .venv/.current

demo: .venv  ## teach a tiny model from videos: warm start, GRPO, report (SEED=7 for another seed)
	@rm -rf runs/demo  # starts from scratch; `rlvid grpo jobs/configs/demo.yaml` resumes an interrupted demo
	exec rlvid grpo jobs/configs/demo.yaml $(if $(SEED),seed=$(SEED))

bench: .venv  ## run the benchmarks, write their table into docs/performance.md (NAMES="driver memory" for some)
	@python -c 'import trl' 2>/dev/null || uv pip install --quiet --python .venv/bin/python trl  # for comparison; rlvid does not depend on it
	python -m benchmarks $(NAMES)

demo-ppo: .venv  ## the same with PPO, a critic on the policy's network (SEED=7 for another seed)
	@rm -rf runs/ppo_demo
	exec rlvid ppo jobs/configs/ppo_demo.yaml $(if $(SEED),seed=$(SEED))

bench-algorithms: .venv  ## PPO, GRPO and its relatives on three seeds each (ARGS="--seeds 1" for one)
	@python -m benchmarks.algorithms $(ARGS)

test: .venv  ## run the tests without the slow ones (ARGS="-k fleet" for some of them)
	@$(PYTEST) -m "not slow and not families" $(ARGS)

test-slow: .venv  ## run the slow tests: whole runs that are killed, interrupted, resized and resumed
	@$(PYTEST) -m slow $(ARGS)

test-families: .venv  ## two steps of sft, dpo and grpo with every family
	@$(PYTEST) -m families $(ARGS)

lint: .venv  ## check style, types, imports between rooms and docs/configuration.md
	@ruff check .
	ruff format --check .
	mypy rlvid actors jobs benchmarks
	lint-imports
	python -m rlvid.config.docs --check
	python -m rlvid.models.families.docs --check

format: .venv  ## format the code and fix what ruff can fix
	@ruff check --fix .
	ruff format .

docs: .venv  ## write docs/configuration.md from rlvid/config
	@python -m rlvid.config.docs
	python -m rlvid.models.families.docs

size:  ## count lines of code per room, and name the largest file, function and class
	@python3 tests/size.py

lock: .venv  ## resolve the pinned versions again
	@compile="uv pip compile --quiet --upgrade --python-version 3.11 --python-platform x86_64-manylinux_2_28 --extra dev"
	export UV_CUSTOM_COMPILE_COMMAND="make lock"
	$$compile $(if $(PIP_FIND_LINKS),,--torch-backend=cpu) --extra cpu --output-file requirements/cpu.lock pyproject.toml
	$$compile --extra gpu --output-file requirements/gpu.lock pyproject.toml

clean:  ## remove caches and build leftovers (not .venv, not runs/)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

help:  ## show this
	@echo 'make .venv     install into .venv (EXTRA=gpu for machines with CUDA)'
	sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1\t\2/p' Makefile | expand -t 15
