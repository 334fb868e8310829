# Most targets are abbreviations of cargo commands that also work without make. Everything, lint included, is built in the
# release profile and, except by msrv, in one target folder, so that build scripts and macros are compiled once.

CARGO ?= cargo
TARGET = $(abspath $(or $(CARGO_TARGET_DIR),target))
.DEFAULT_GOAL := help
.PHONY: help demo smollm test test-discrete test-listed test-long variants bench lint cross msrv deny check-shaders docs guide test-docs package semver mpi lint-mpi test-mpi ensure-mpi install-capi uninstall-capi test-python test-ase vulkan python components targets

# The systems for which `make cross` checks that everything compiles.
CROSS = x86_64-pc-windows-msvc aarch64-apple-darwin

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: vulkan ## train a small language model with tied layers and write its results to out/demo
	@echo "building, which takes some minutes the first time; then about two minutes of training"
	$(CARGO) run --release --example charlm -- --out out/demo

smollm: vulkan ## download a 135M-parameter model (98 MB, outside the repository) and ask it a question
	$(CARGO) run --release --bin tiebeam -- run "$$(sh scripts/fetch-smollm.sh)" --prompt "What is the capital of France?"

test: vulkan ## run every test and doctest; needs an adapter, which may be a software driver
	$(CARGO) test --release --all-features

test-discrete: vulkan ## test ops, sharing, geometry and training with the kernels for a discrete GPU, on any adapter
	TIEBEAM_DEVICE=discrete $(CARGO) test --release --all-features --test ops
	TIEBEAM_DEVICE=discrete $(CARGO) test --release --all-features --test engine --test systems -- sharing:: training:: geometry::

mpi: ensure-mpi ## build tiebeam-mpi, target/release/tiebeam-mpi; installs MPI and libclang if they are missing
	$(CARGO) build --release --package tiebeam-mpi
	@echo "mpirun -n 2 target/release/tiebeam-mpi help"

lint-mpi: ensure-mpi ## check tiebeam-mpi with clippy and its documentation; warnings are errors
	$(CARGO) clippy --release --package tiebeam-mpi --all-targets -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --no-deps --package tiebeam-mpi

test-mpi: vulkan ensure-mpi ## test tiebeam-mpi under mpirun, with up to 4 ranks on this machine
	$(CARGO) test --release --package tiebeam-mpi

test-long: vulkan ## test long loops, sums of up to 2^26 terms, threads for minutes, 3000 random graphs: up to an hour
	TIEBEAM_LONG=1 $(CARGO) test --release --all-features --test long
	TIEBEAM_DEVICE=discrete $(CARGO) test --release --all-features
	TIEBEAM_GRAPHS=3000 $(CARGO) test --release --all-features --test engine -- graphs::

# Fails for any kernel outside the list. So every kernel that runs here has been compiled for every target.
test-listed: export TIEBEAM_VARIANTS = $(CURDIR)/shaders/variants.txt
test-listed: test test-discrete

# The list is made from scratch, so that kernels which are no longer used disappear from it.
variants: export TIEBEAM_VARIANTS = $(CURDIR)/shaders/variants.txt
variants: export TIEBEAM_RECORD_VARIANTS = 1
variants: vulkan ## recreate shaders/variants.txt, the list of kernels that tests and benchmark compile: half an hour
	rm -f '$(TIEBEAM_VARIANTS)'
	$(CARGO) test --release --all-features -- --skip every_variant_translates --skip lines_are_read_back --skip planned_kernels
	$(MAKE) --no-print-directory test-discrete
	$(CARGO) run --release --bin tiebeam -- bench --suite full
	$(CARGO) test --release --all-features --test house -- planned_kernels
	LC_ALL=C sort -u -o '$(TIEBEAM_VARIANTS)' '$(TIEBEAM_VARIANTS)'

bench: vulkan ## run every benchmark on this machine's adapter
	$(CARGO) bench

lint: components ## check formatting, clippy with and without features, and documentation; warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --all-targets --all-features -- -D warnings
	$(CARGO) clippy --release --package tiebeam --lib -- -D warnings
	$(MAKE) --no-print-directory docs

cross: targets ## check that library and command compile for Windows and macOS, without linking
	RUSTFLAGS="-D warnings" $(CARGO) check --release --workspace --exclude tiebeam-mpi --lib --bins --all-features $(CROSS:%=--target %)

# The oldest Rust that Cargo.toml promises.
MSRV = $(shell sed -n 's/^rust-version = "\(.*\)"/\1/p' Cargo.toml)

msrv: ## check that everything compiles with the oldest Rust that Cargo.toml promises
	@rustc +$(MSRV) --version >/dev/null 2>&1 || rustup toolchain install $(MSRV) --profile minimal || { \
		echo "Rust $(MSRV) is missing: rustup toolchain install $(MSRV) needs rustup and the network" >&2; exit 1; }
	$(CARGO) +$(MSRV) check --release --all-targets --all-features --target-dir '$(TARGET)/msrv'

deny: ## check licences, sources and duplicate versions of dependencies; ADVISORIES=1 adds RustSec's list, from GitHub
	@$(CARGO) deny --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-deny@0.20.2
	$(CARGO) deny --all-features check bans licenses sources $(if $(ADVISORIES),advisories)

# The folder below target/ for downloaded tools and the texts of kernels.
CHECKED = $(TARGET)/check-shaders

check-shaders: ## compile every kernel with the compilers of DX12, Vulkan, OpenGL ES and WebGPU: docs/drivers.md
	rm -rf '$(CHECKED)/kernels'
	TIEBEAM_DUMP_SHADERS='$(CHECKED)/kernels' $(CARGO) test --release --all-features --test house -- shaders::every_variant
	python3 scripts/check-shaders.py '$(CHECKED)/kernels' $(CHECK_SHADERS)

docs: ## build the documentation, target/doc/tiebeam/index.html
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --release --no-deps --all-features

install-capi: ## build and install the C library with header and pkg-config file: PREFIX=/usr/local, DESTDIR, LIBDIR=lib
	@CARGO='$(CARGO)' PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' LIBDIR='$(LIBDIR)' sh scripts/install-capi.sh

uninstall-capi: ## remove what install-capi has installed, given the same PREFIX, DESTDIR and LIBDIR
	@CARGO='$(CARGO)' PREFIX='$(PREFIX)' DESTDIR='$(DESTDIR)' LIBDIR='$(LIBDIR)' sh scripts/install-capi.sh uninstall

PYTHON ?= python3
# The folder below target/ for the virtual environment and the model of the Python package's tests.
TRIED = $(TARGET)/python

test-python: vulkan ## install the Python package with ASE in a virtual environment below target/, from the network, and test it
	$(CARGO) build --release --bin tiebeam --example potential
	'$(TARGET)/release/examples/potential' --epochs 1 --channels 8 --radius 5 --md-steps 10 --out '$(TRIED)/model'
	$(PYTHON) -m venv '$(TRIED)/venv'
	'$(TRIED)/venv/bin/python' -m pip install --quiet './python[ase]'
	TIEBEAM_TEST_DATA='$(TRIED)/model' TIEBEAM_COMMAND='$(TARGET)/release/tiebeam' \
		'$(TRIED)/venv/bin/python' python/tests/test_calculator.py

test-ase: ## compare the reader of extended XYZ with ASE's, which is installed in a virtual environment below target/, from the network
	$(CARGO) build --release --example labels
	$(PYTHON) -m venv '$(TRIED)/venv'
	'$(TRIED)/venv/bin/python' -m pip install --quiet 'ase>=3.23'
	TIEBEAM_LABELS='$(TARGET)/release/examples/labels' '$(TRIED)/venv/bin/python' python/tests/test_extxyz.py

guide: ## build the guide from docs/ with mdBook, target/guide/index.html
	@mdbook --version >/dev/null 2>&1 || $(CARGO) install --locked mdbook@0.5.4 --no-default-features --features search
	mdbook build docs

test-docs: vulkan python ## check links, names and commands of all pages, run the short commands and every program in them
	python3 scripts/test-docs.py --self-test
	$(CARGO) build --release --all-features --bin tiebeam --examples
	python3 scripts/test-docs.py
	$(CARGO) test --release --all-features --doc -- pages::

package: $(if $(NO_VERIFY),,ensure-mpi) ## check what would be published, without publishing: NO_VERIFY=1 leaves out compiling it
	$(CARGO) publish --workspace --dry-run $(if $(NO_VERIFY),--no-verify)

# A published version, or a revision such as main.
BASE = main
semver: ## list changes of the library's interface since BASE that break programs: make semver BASE=v0.1.0
	@$(CARGO) semver-checks --version >/dev/null 2>&1 || $(CARGO) install --locked cargo-semver-checks
	$(CARGO) semver-checks --package tiebeam --all-features --baseline-rev '$(BASE)'

# Installs a software Vulkan driver if there is no driver, and says so first.
vulkan:
	@sh scripts/ensure-vulkan.sh

# Installs MPI and libclang if they are missing, and says so first.
ensure-mpi:
	@sh scripts/ensure-mpi.sh

python:
	@python3 --version >/dev/null 2>&1 || { echo "python3 is missing: installing it" >&2; apt-get install -qq -y python3; }

components:
	@$(CARGO) fmt --version >/dev/null 2>&1 || { echo "rustfmt is missing: rustup component add rustfmt" >&2; exit 1; }
	@$(CARGO) clippy --version >/dev/null 2>&1 || { echo "clippy is missing: rustup component add clippy" >&2; exit 1; }

# Checking needs the standard library of the other systems, but no linker.
targets:
	@for target in $(CROSS); do \
		[ -d "$$(rustc --print target-libdir --target $$target)" ] || rustup target add $$target || { \
			echo "Rust's standard library for $$target is missing: rustup target add $$target" \
				"needs rustup and the network" >&2; exit 1; }; \
	done
