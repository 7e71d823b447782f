# One command each; `make` alone lists them. Everything a target needs it installs itself (Debian, as root; Rust is assumed).

SHELL := /bin/bash
CARGO ?= cargo

.DEFAULT_GOAL := help
.PHONY: help build docs test lint demo bench fuzz deps clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

build: ## slipwayd and erofs-convert, optimised, in target/release
	@tools/ci/packages.sh build
	$(CARGO) build --release --workspace --bins

docs: build ## manual pages and completion scripts, in target/docs
	mkdir -p target/docs
	target/release/erofs-convert man target/docs
	for shell in bash zsh fish; do target/release/erofs-convert completion $$shell >target/docs/erofs-convert.$$shell || exit; done

test: ## everything: house rules, unit, property and whole-system tests, here and in the guest kernel
	@tools/ci/test.sh

lint: ## formatting and clippy, warnings are errors
	@tools/ci/packages.sh build
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets -- -D warnings

demo: ## a real image, pulled the ordinary way and through Slipway, side by side
	@tools/ci/demo.sh

bench: ## the benchmarks: every figure beside a reference measured in the same run
	@tools/ci/packages.sh build test demo bench
	$(CARGO) build --release --workspace --bins
	$(CARGO) bench --bench data_path --bench whole --bench convert

fuzz: ## every fuzz target for SECONDS_EACH (default 60) seconds
	@tools/ci/fuzz.sh $(or $(SECONDS_EACH),60)

deps: ## the Debian packages that build, test, demo and benchmarks use
	@tools/ci/packages.sh build test demo bench

clean: ## removes what was built here (the caches in ~/.cache/slipway stay)
	$(CARGO) clean
