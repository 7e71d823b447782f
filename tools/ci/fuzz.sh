#!/bin/bash
# Runs every fuzz target of tools/fuzz for so many seconds each (default 60); what it learns is kept in tools/fuzz/corpus.
# Stable Rust: the coverage instrumentation that libFuzzer needs is switched on by hand.
set -euo pipefail
cd "$(dirname "$0")/../fuzz"
../ci/packages.sh fuzz
seconds=${1:-60}
host=$(rustc -vV | sed -n 's/^host: //p') # named, so that build scripts are not instrumented
export RUSTFLAGS="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1"
cargo build --release --target "$host"
for path in targets/*.rs; do
    name=$(basename "$path" .rs)
    mkdir -p "corpus/$name"
    echo "==> $name, $seconds s"
    "target/$host/release/$name" "corpus/$name" -max_total_time="$seconds" -print_final_stats=1
done
