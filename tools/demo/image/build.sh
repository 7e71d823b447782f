#!/bin/bash
# Makes the layers of the demo's image: Debian by debootstrap, Python on top, then two layers of PyPI packages and a small program,
# each the difference an ordinary build step leaves (real whiteouts, hard links, set-id files, device nodes).
# Prints on stdout the directory that holds them: NN-<name>.tar.gz with .diffid (SHA-256) and .size of the uncompressed tar.
#
# Kept in ${SLIPWAY_CACHE:-~/.cache/slipway}/demo-image/<key>; the key covers every file beside this script. Needs root and
# debootstrap, pigz, attr and python3-pip (tools/ci/packages.sh demo).
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
suite=bookworm
python=3.11 # of that suite

cache=${SLIPWAY_CACHE:-$HOME/.cache/slipway}/demo-image
key=$(cd "$here" && cat build.sh data.txt ml.txt versions.txt workload.py | sha256sum | cut -c1-16)
out=$cache/$key
if [ -f "$out/complete" ]; then
    echo "$out"
    exit 0
fi

say() { echo "image: $*" >&2; }
mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9 # a second build at the same time would only find the first one's result
[ ! -f "$out/complete" ] || { echo "$out"; exit 0; }

work=$(mktemp -d "$cache/work.XXXXXX")
unmount_all() {
    local at
    for at in wheels etc/hosts etc/resolv.conf dev proc ''; do
        ! mountpoint -q "$work/root/$at" || umount -l "$work/root/$at"
    done
}
trap 'unmount_all; rm -rf "$work"' EXIT

say "downloading $(grep -vc '^#' "$here/versions.txt") packages from PyPI (kept in $cache/wheels)"
mkdir -p "$cache/wheels"
platforms=$(printf -- '--platform=manylinux%s_x86_64 ' 2014 _2_17 _2_24 _2_27 _2_28)
# shellcheck disable=SC2086 # one word per platform
/usr/bin/python3 -m pip download -q --no-deps --only-binary=:all: --implementation=cp --python-version="$python" $platforms \
    -d "$cache/wheels" -r "$here/versions.txt" >&2

mirror=$("$here/../../ci/debian-mirror.sh")
say "debootstrap $suite"
debootstrap --variant=minbase "$suite" "$work/layer-1" "$mirror" >"$work/debootstrap.log" 2>&1 || { tail -n 5 "$work/debootstrap.log" >&2; exit 1; }
rm -rf "$work/layer-1/var/cache/apt/archives"/*.deb "$work/layer-1/var/lib/apt/lists"/*

# step N COMMAND: runs COMMAND on top of the layers below N and leaves what it changed in layer-N.
step() {
    local number=$1 lower='' i
    shift
    for ((i = number - 1; i >= 1; i--)); do lower+=${lower:+:}$work/layer-$i; done
    mkdir -p "$work/layer-$number" "$work/overlay-$number" "$work/root"
    mount -t overlay -o "lowerdir=$lower,upperdir=$work/layer-$number,workdir=$work/overlay-$number,index=off,metacopy=off,redirect_dir=off" overlay "$work/root"
    touch "$work/root/etc/resolv.conf" "$work/root/etc/hosts"
    mkdir -p "$work/root/wheels"
    mount --bind /etc/resolv.conf "$work/root/etc/resolv.conf"
    mount --bind /etc/hosts "$work/root/etc/hosts"
    mount --bind "$cache/wheels" "$work/root/wheels"
    mount -t proc proc "$work/root/proc"
    mount --bind /dev "$work/root/dev"
    env -i PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
        ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
        chroot "$work/root" sh -euc "$*" >"$work/step-$number.log" 2>&1 || { tail -n 15 "$work/step-$number.log" >&2; exit 1; }
    unmount_inner
    rmdir "$work/root/wheels"
    umount "$work/root"
}
unmount_inner() {
    local at
    for at in wheels etc/hosts etc/resolv.conf dev proc; do umount "$work/root/$at"; done
}
pip='python3 /wheels/pip-26.3-py3-none-any.whl/pip install -q --no-index --find-links=/wheels --break-system-packages --root-user-action=ignore'

say "python"
step 2 'apt-get -q update; apt-get -q install -y --no-install-recommends python3 libgomp1 ca-certificates
    rm -rf /var/lib/apt/lists/* /var/cache/apt/*.bin /var/cache/apt/archives/*.deb /usr/share/doc/* /usr/share/man/*'
say "data packages"
mkdir -p "$work/layer-3/opt/app" && cp "$here"/*.txt "$work/layer-3/opt/app/"
step 3 "$pip -c /opt/app/versions.txt -r /opt/app/data.txt"
say "machine learning packages"
step 4 "$pip -c /opt/app/versions.txt -r /opt/app/ml.txt"
mkdir -p "$work/layer-5/opt/app" && cp "$here/workload.py" "$work/layer-5/opt/app/"
step 5 'rm /opt/app/*.txt; useradd --system --home-dir /opt/app --shell /usr/sbin/nologin app; python3 -m compileall -q /opt/app'

# overlayfs marks what a layer removes by a 0/0 device and an xattr; in an image these are files named .wh.* .
whiteouts() {
    find "$1" -type c -print0 | while IFS= read -r -d '' path; do
        [ "$(stat -c '%t:%T' "$path")" = 0:0 ] || continue
        rm "$path"
        touch "$(dirname "$path")/.wh.$(basename "$path")"
    done
    getfattr -R -h --absolute-names -m '^trusted\.overlay\.opaque$' "$1" 2>/dev/null | sed -n 's/^# file: //p' | while IFS= read -r path; do
        touch "$path/.wh..wh..opq"
    done
}

mkdir -p "$work/out"
number=0
for name in debian python data ml app; do
    number=$((number + 1))
    whiteouts "$work/layer-$number"
    file=$work/out/0$number-$name
    say "layer $name: $(du -sm "$work/layer-$number" | cut -f1) MB"
    # No atime and ctime: they change with every look at the file.
    (cd "$work/layer-$number" && find . -mindepth 1 -maxdepth 1 -printf '%P\0' | sort -z |
        tar --create --null --files-from=- --sort=name --numeric-owner --format=posix --pax-option=delete=atime,delete=ctime \
            --xattrs --xattrs-include='*' --xattrs-exclude='trusted.overlay.*') >"$work/layer.tar"
    sha256sum <"$work/layer.tar" | cut -d' ' -f1 >"$file.diffid"
    stat -c %s "$work/layer.tar" >"$file.size"
    pigz -6 -n <"$work/layer.tar" >"$file.tar.gz"
    rm -rf "$work/layer-$number"
done
touch "$work/out/complete"
rm -rf "$out"
mv "$work/out" "$out"
echo "$out"
