#!/bin/bash
# Runs every fuzz target of tools/fuzz for so many seconds each (default 60). Stable Rust: the coverage instrumentation that
# libFuzzer needs is switched on by hand.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"
seconds=${1:-60}
target=$(rustc -vV | sed -n 's/^host: //p')
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
cargo build --release --target "$target"
for name in $(cargo metadata --no-deps --format-version 1 | grep -o '"kind":\["bin"\],"crate_types":\["bin"\],"name":"[^"]*"' | sed 's/.*"name":"//; s/"$//'); do
    mkdir -p "corpus/$name"
    echo "==> $name, $seconds s"
    "target/$target/release/$name" "corpus/$name" -max_total_time="$seconds" -print_final_stats=1
done
