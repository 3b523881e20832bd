# On a bare machine with python3 and make: `make demo`, `make test`. Everything is installed into .venv.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# mmsegmentation's pins are exact, so it has an environment of its own. uv fills it in a minute; pip looks for versions that
# fit together for more than twenty.
MMSEG := $(VENV)/mmseg
# The lowest versions that pyproject.toml allows, on the oldest Python; extras of object storage, whose pins are many.
LOWEST := $(VENV)/lowest
OLDEST ?= python3.10
# Arguments for pytest, for example `make test ARGS="tests/fields -k linear"`.
ARGS ?=
# One thread a process: pytest runs two of them.
PYTEST := OMP_NUM_THREADS=1 $(PY) -m pytest -n 2

.PHONY: docs demo test test-all test-mmseg test-lowest test-extras lint format types bench bench-check clean test-gpu bench-gpu

demo: $(VENV)/.installed
	$(VENV)/bin/dvt demo

test: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" $(ARGS)

test-all: $(VENV)/.installed-test
	$(PYTEST) $(ARGS)

test-mmseg: $(MMSEG)/.installed
	OMP_NUM_THREADS=1 $(MMSEG)/bin/python -m pytest tests/denoiser/test_mmseg.py $(ARGS)

# Run it when a bound in pyproject.toml changes.
test-lowest: $(LOWEST)/.installed
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n 2 -m "not slow" $(ARGS)

# What `make test` skips for want of a package: stores and images on S3 (a server of its own stands in for Amazon's).
test-extras: $(VENV)/.installed-test
	$(PY) -m pip install --quiet "moto[server]>=5" "s3fs>=2024.2"
	$(PYTEST) -rs tests/jobs/test_cluster.py tests/jobs/test_extract.py tests/ground/test_training.py $(ARGS)

# The site, into build/site; a broken link or reference is an error.
docs: $(VENV)/.installed-test
	$(PY) -m mkdocs build --quiet

# On a machine with one GPU, without a network, under ten minutes each. Without a GPU, `make test-gpu DEVICE=standin` and
# `make bench-gpu DEVICE=standin SMOKE=--smoke` go the same way on the tests' stand-in.
DEVICE ?= cuda
SMOKE ?=
test-gpu: $(VENV)/.installed-test
	$(PY) benchmarks/gpu.py check --device $(DEVICE) $(SMOKE) --out test-gpu.json

bench-gpu: $(VENV)/.installed-test
	$(PY) benchmarks/gpu.py speed --device $(DEVICE) $(SMOKE) --out bench-gpu.json

lint: $(VENV)/.installed-dev
	$(PY) -m ruff check
	$(PY) -m ruff format --check

format: $(VENV)/.installed-dev
	$(PY) -m ruff check --fix
	$(PY) -m ruff format

# Type checkers cannot follow the mapping of folders to packages in an editable install, so a wheel is built, unpacked
# by pip and checked there, away from the sources.
types: $(VENV)/.installed-dev
	rm -rf build $(VENV)/wheel $(VENV)/unpacked
	$(PY) -m build --quiet --wheel --outdir $(VENV)/wheel
	$(PY) -m pip install --quiet --no-deps --target $(VENV)/unpacked $(VENV)/wheel/*.whl
	rm -rf build
	cd $(VENV)/unpacked && ../bin/python -m mypy --config-file ../../pyproject.toml --cache-dir ../mypy -p dvt

# Each benchmark at a size that needs no data and takes minutes; the last line of each, JSON, goes to bench.jsonl.
# The first leaves photographs for extract.py.
BENCH := "cost.py flops local h200 --rounds 2 --photos build/bench-photos" "stage_one.py planted views --threads 1" \
	"denoiser.py latency --threads 1 --batch 2 --repeats 5" "extract.py speed --images build/bench-photos" "overlap.py --smoke" "priors.py --smoke" "store.py --maps 500 --rounds 5"
bench: $(VENV)/.installed-test
	rm -f bench.jsonl
	for job in $(BENCH); do echo "== $$job"; $(PY) benchmarks/$$job > bench.txt || exit 1; cat bench.txt; \
		tail -n 1 bench.txt >> bench.jsonl; done; rm bench.txt

# Fails when a ratio is worse than benchmarks/recorded.json allows.
bench-check: bench
	$(PY) benchmarks/check.py

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(PY):
	$(PYTHON) -m venv $(VENV)

# The stamps: packages are installed again only when pyproject.toml changes. A larger set stamps the smaller ones too.
$(VENV)/.installed: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-test: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet -e ".[test]"
	touch $(VENV)/.installed $@

$(VENV)/.installed-dev: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet -e ".[dev]"
	touch $(VENV)/.installed $(VENV)/.installed-test $@

$(LOWEST)/.installed: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet uv
	$(VENV)/bin/uv venv --quiet --clear --python $(OLDEST) $(LOWEST)
	$(VENV)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e ".[test]"
	touch $@

$(MMSEG)/.installed: pyproject.toml | $(PY)
	$(PY) -m pip install --quiet uv
	$(VENV)/bin/uv venv --quiet --clear --python $(PYTHON) $(MMSEG)
	$(VENV)/bin/uv pip install --quiet --python $(MMSEG)/bin/python -e ".[test,mmseg]"
	touch $@
