#!/bin/bash
# `make demo`: installs what the demo needs, builds, makes the image (both kept for the next time) and runs it.
set -euo pipefail
cd "$(dirname "$0")/../.."

[ "$(uname -m)" = x86_64 ] || { echo "demo: its image is made of amd64 packages, so it runs on x86_64 and not on $(uname -m)" >&2; exit 1; }
[ "$(id -u)" = 0 ] || { echo "demo: needs root, for mounts and containers" >&2; exit 1; }
tools/ci/packages.sh build demo
cargo build --release --workspace --bins
target/release/slipway-demo --check # before minutes go into the image
layers=$(tools/demo/image/build.sh)
exec target/release/slipway-demo --layers "$layers" "$@"
