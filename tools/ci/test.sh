#!/bin/bash
# The whole test run (`make test`): installs what it needs, builds the guest kernel beside the Rust code, then lints and tests.
#
# Set CI or SLIPWAY_NO_SKIP=1 and a test that would skip for want of something fails instead.
set -euo pipefail
cd "$(dirname "$0")/../.."
. tools/ci/phases.sh

phase "Debian packages" tools/ci/packages.sh build test
background "guest kernel" tools/guest-kernel/build.sh
phase "build" cargo build --workspace --bins --tests
phase "formatting" cargo fmt --all --check
phase "clippy" cargo clippy -q --workspace --all-targets -- -D warnings
# Checked, not linked: libFuzzer itself, which is C++, need not be there.
phase "fuzz targets" env CUSTOM_LIBFUZZER_PATH=/dev/null cargo check -q --manifest-path tools/fuzz/Cargo.toml --target-dir target
phase "guest kernel, the rest" finish
phase "tests" cargo test --workspace --no-fail-fast
phase_summary
