#!/bin/bash
# `make demo`: installs what the demo needs, builds, makes the image (both kept for the next time) and runs it.
set -euo pipefail
cd "$(dirname "$0")/../.."

[ "$(id -u)" = 0 ] || { echo "demo: needs root, for mounts and containers" >&2; exit 1; }
tools/ci/packages.sh build demo
cargo build --release --workspace --bins
layers=$(tools/demo/image/build.sh)
exec target/release/slipway-demo --layers "$layers" "$@"
