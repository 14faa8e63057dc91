# The first two commands of the README, `make bench` and `make test`, start from nothing.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
ROUTING := benchmarks/routing_bytes_e256_k8.npz
CPP := $(wildcard csrc/*.h csrc/*/*.h csrc/*/*.cc csrc/*/*.cu csrc/*/*.cuh \
  tests/simt/*.h tests/simt/*.cc tests/sanitize/*.h tests/sanitize/*.cc)
# Arguments of the benchmark: make bench ARGS="--ranks 4 --wire all"
ARGS ?=
# make soak MINUTES=10 [RANKS=8] [SEED=1] [DEVICE=cpu|simt|cuda]
MINUTES ?= 10
DEVICE ?= cpu

.PHONY: bench test check compile sanitize model fuzz fuzz-binding soak format clean
.DELETE_ON_ERROR:

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench,test,dev]'
	touch $@

bench: $(INSTALLED)
	$(RUN) -m moe_a2a bench --preset deepseek-v3 --routing $(ROUTING) $(ARGS)

test: $(INSTALLED)
	$(RUN) -m pytest $(ARGS)

soak: $(INSTALLED)
	$(RUN) -m tests.soak --minutes $(MINUTES) --device $(DEVICE) \
	  $(if $(RANKS),--ranks $(RANKS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

check: $(INSTALLED)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(VENV)/bin/codespell
	@git ls-files '*.py' 'csrc/*' | xargs wc -l | awk \
	  '$$2 != "total" && $$1 > 400 { print $$2 ": " $$1 " lines, at most 400"; bad = 1 } END { exit bad }'

format: $(INSTALLED)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

# Whole sessions and bad calls, from another seed each time; then what the binding refuses, guided by
# coverage and under AddressSanitizer. CONTRIBUTING.md says how a failure is repeated.
fuzz: $(INSTALLED)
	$(RUN) -m tests.fuzz --minutes $(MINUTES) $(ARGS)

fuzz-binding: $(INSTALLED)
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[fuzz]'
	$(RUN) -m tests.fuzz.atheris_binding $(or $(ARGS),-max_total_time=$$(($(MINUTES) * 60)))

# Every CUDA source for every architecture, without a GPU.
compile: $(INSTALLED)
	$(RUN) -m moe_a2a._build

# Rounds of the CPU kernels under ThreadSanitizer, AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(INSTALLED)
	$(RUN) -m tests.sanitize $(ARGS)

# The protocol, model-checked; ARGS=--quick for what takes seconds. Needs spin and gcc, no Python
# packages.
model:
	$(PYTHON) docs/protocol/check.py $(ARGS)

clean:
	rm -rf $(VENV) .bench .fuzz .mypy_cache .ruff_cache .pytest_cache .hypothesis
