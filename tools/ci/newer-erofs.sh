#!/bin/bash
# Makes a newer erofs-utils than the system's usable without touching the system, and prints the directory with its mkfs.erofs,
# fsck.erofs and dump.erofs. Debian's packages of a later suite are unpacked, their own libc included, into
# ${SLIPWAY_CACHE:-~/.cache/slipway}/newer-erofs.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
suite=trixie
out=${SLIPWAY_CACHE:-$HOME/.cache/slipway}/newer-erofs/$suite
if [ -d "$out/bin" ]; then
    echo "$out/bin"
    exit 0
fi

mkdir -p "$(dirname "$out")"
exec 9>"$out.lock"
flock 9 # two at once would write over each other; the second finds the first one's result
if [ ! -d "$out/bin" ]; then
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    mkdir -p "$work/lists/partial" "$work/archives/partial"
    : >"$work/status" # nothing is installed there, so every dependency is fetched
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n' \
        "$("$here/debian-mirror.sh")" "$suite" >"$work/suite.sources"
    apt() {
        apt-get -q -o Dir::Etc::SourceList="$work/suite.sources" -o Dir::Etc::SourceParts=- -o Dir::State="$work" -o Dir::State::Lists="$work/lists" \
            -o Dir::State::status="$work/status" -o Dir::Cache="$work" -o Dir::Cache::Archives="$work/archives" -o APT::Sandbox::User=root "$@" \
            >"$work/log" 2>&1 || { tail -n 15 "$work/log" >&2; exit 1; }
    }
    apt update
    apt install -y --download-only --no-install-recommends erofs-utils
    for deb in "$work"/archives/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
    mkdir "$work/root/bin.new"
    for tool in mkfs.erofs fsck.erofs dump.erofs; do
        # Its own loader and libraries: this libc may be older than what it was built for.
        cat >"$work/root/bin.new/$tool" <<'WRAPPER'
#!/bin/sh
root=$(dirname "$(readlink -f "$0")")/../root
libraries=$(echo "$root"/usr/lib/*-linux-gnu)
exec "$(echo "$libraries"/ld-linux-*.so.*)" --library-path "$libraries" "$root/usr/bin/$(basename "$0")" "$@"
WRAPPER
        chmod +x "$work/root/bin.new/$tool"
    done
    rm -rf "$out.new"
    mkdir -p "$out.new/root"
    cp -a "$work/root/usr" "$out.new/root/"
    mv "$work/root/bin.new" "$out.new/bin"
    mv "$out.new" "$out"
fi
echo "$out/bin"
