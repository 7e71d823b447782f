#!/bin/bash
# Unpacks the archives that Go's archive/tar and Python's tarfile are tested with, from Debian's packages of them, and prints the directory:
# ${SLIPWAY_CACHE:-~/.cache/slipway}/tar-corpora. Nothing is installed.
set -euo pipefail
out=${SLIPWAY_CACHE:-$HOME/.cache/slipway}/tar-corpora
mkdir -p "$(dirname "$out")"
exec 9>"$out.lock"
flock 9 # two at once would write over each other; the second finds the first one's result
if [ ! -d "$out" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    cd "$work"
    fetch() { apt-get -q -o APT::Sandbox::User=root download golang-1.19-src libpython3.11-testsuite; }
    # Old lists name packages that the mirror no longer has.
    { fetch || { apt-get -q update && fetch; }; } >log 2>&1 || { tail -n 15 log >&2; exit 1; }
    for deb in ./*.deb; do dpkg-deb -x "$deb" root; done
    mkdir corpora
    for archive in root/usr/share/go-*/src/archive/tar/testdata/*.tar; do cp "$archive" "corpora/go-$(basename "$archive")"; done
    for archive in root/usr/lib/python3*/test/*.tar; do cp "$archive" "corpora/python-$(basename "$archive")"; done
    rm -rf "$out.new"
    cp -r corpora "$out.new" # perhaps to another file system, so not in one step
    mv "$out.new" "$out"
fi
echo "$out"
