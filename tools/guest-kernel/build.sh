#!/bin/bash
# Builds the guest kernel: Debian's Linux 6.1 as User-Mode Linux, an ordinary process that boots in about a second and has what
# the host kernel may lack (cachefiles on-demand, knfsd and the NFS client). Prints the path of the finished `linux` on stdout.
#
# The result is kept in ${SLIPWAY_CACHE:-~/.cache/slipway}/guest-kernel/<key>/linux. The key covers kernel.config, this script and
# the version of the source package, so a change of any of them builds anew and nothing else does.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source_tar=/usr/src/linux-source-6.1.tar.xz

for tool in flex bison bc xz make gcc; do
    command -v "$tool" >/dev/null || { echo "guest-kernel: $tool is missing: apt-get install flex bison bc libelf-dev xz-utils make gcc" >&2; exit 1; }
done
[ -f "$source_tar" ] || { echo "guest-kernel: $source_tar is missing: apt-get install linux-source-6.1" >&2; exit 1; }

version=$(dpkg-query -W -f '${Version}' linux-source-6.1)
key=$(cat "$here/kernel.config" "$here/build.sh" <(echo "$version") | sha256sum | cut -c1-16)
out=${SLIPWAY_CACHE:-$HOME/.cache/slipway}/guest-kernel/$key
if [ -x "$out/linux" ]; then
    echo "$out/linux"
    exit 0
fi

mkdir -p "$out"
exec 9>"$out/lock"
flock 9 # two builds at once would waste both cores; the second finds the first one's result
if [ ! -x "$out/linux" ]; then
    work=$(mktemp -d "${TMPDIR:-/tmp}/guest-kernel.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    {
        tar -xf "$source_tar" -C "$work" --strip-components=1
        cd "$work"
        make ARCH=um defconfig
        scripts/kconfig/merge_config.sh -m .config "$here/kernel.config"
        make ARCH=um olddefconfig
        make ARCH=um -j"$(nproc)" linux
    } >"$out/build.log" 2>&1 || { echo "guest-kernel: the build failed; its log is $out/build.log" >&2; tail -n 5 "$out/build.log" >&2; exit 1; }
    strip "$work/linux"
    cp "$work/linux" "$out/linux.new"
    mv "$out/linux.new" "$out/linux"
fi
echo "$out/linux"
