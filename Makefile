# Everything here sets itself up, in .venv. See CONTRIBUTING.md.
PYTHON_ENV := .venv/bin/python
SOURCES := moequant kernels launch benchmarks examples tests
GPUS := $(wildcard /dev/nvidia[0-9]*)
# test processes: one for each core, or a few where they share GPUs
WORKERS ?= $(if $(GPUS),4,auto)
# arguments of launch/bench_ep.py
ARGS ?=

.PHONY: bench test lint format clean

bench: .venv/.ready
	@gpus=$$($(PYTHON_ENV) -c 'import torch; print(torch.cuda.device_count())') && \
	PYTHONPATH=. $(PYTHON_ENV) -m torch.distributed.run --standalone --nproc-per-node $$(( gpus > 0 ? gpus : 2 )) launch/bench_ep.py $(ARGS)

test: lint .venv/.tritons .venv/.engines .venv/.transformers-tests
# long tests come first (tests/conftest.py), and a process that has none left takes another's; tests that take all GPUs run one by one
	OMP_NUM_THREADS=1 $(PYTHON_ENV) -m pytest -n $(WORKERS) --dist worksteal $(if $(GPUS),-m "not multigpu")
ifneq ($(GPUS),)
	OMP_NUM_THREADS=1 $(PYTHON_ENV) -m pytest -m multigpu || [ $$? -eq 5 ]
endif

lint: .venv/.ready-to-test
	$(PYTHON_ENV) -m ruff check $(SOURCES)
	$(PYTHON_ENV) -m ruff format --check $(SOURCES)
	$(PYTHON_ENV) -m pyright --pythonpath $(PYTHON_ENV)

format: .venv/.ready-to-test
	$(PYTHON_ENV) -m ruff check --fix $(SOURCES)
	$(PYTHON_ENV) -m ruff format $(SOURCES)

.venv/.ready: pyproject.toml constraints.txt .ci/setup
	@.ci/setup && touch $@

.venv/.ready-to-test: pyproject.toml constraints.txt .ci/setup
	@.ci/setup test lint bench transformers && touch $@

# without network the tests of other releases of Triton are skipped; .ci/run wants them
.venv/.tritons: .venv/.ready-to-test kernels/library/triton_versions.py .ci/fetch_tritons
	@.ci/fetch_tritons && touch $@ || echo "make: the Hopper kernels are tested with the installed Triton alone"

# the same of the serving engines, as plain Python: .venv/<name>-<version>
.venv/.engines: .venv/.ready-to-test $(wildcard tests/integrations/*_packages.txt) tests/integrations/engines.py
	@$(PYTHON_ENV) tests/integrations/engines.py && touch $@ || echo "make: the adapters of serving engines are not tested inside those that are missing"

# without network they are skipped
.venv/.transformers-tests: .venv/.ready-to-test .ci/fetch_transformers_tests
	@.ci/fetch_transformers_tests && touch $@ || echo "make: transformers' own tests are not here, and not run"

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
