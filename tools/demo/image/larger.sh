#!/bin/bash
# larger.sh GB: the demo's image with more layers on top, until all have so many gigabytes compressed. Prints the directory that holds them,
# as build.sh does.
#
# What is added is what large images have: first files that are compressed already (PyPI's packages as they were downloaded), then archives
# in one file each (the tars of the demo's own layers, the smaller first). Together with the demo's own they come to 4.5 GB.
#
# Kept in ${SLIPWAY_CACHE:-~/.cache/slipway}/larger-image/<key of the demo's image>; the layers it shares with the demo's are hard links.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
wanted=$(awk -v gb="$1" 'BEGIN { printf "%.0f", gb * 1e9 }')

demo=$("$here/build.sh")
out=${SLIPWAY_CACHE:-$HOME/.cache/slipway}/larger-image/$(basename "$demo")-$wanted
if [ -f "$out/complete" ]; then
    echo "$out"
    exit 0
fi
mkdir -p "$(dirname "$out")"
exec 9>"$out.lock"
flock 9 # a second build at the same time would only find the first one's result
[ ! -f "$out/complete" ] || { echo "$out"; exit 0; }

work=$(mktemp -d "$out.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/out" "$work/files"
ln "$demo"/*.tar.gz "$demo"/*.diffid "$demo"/*.size "$work/out/"

# layer NN-NAME DIR: what DIR holds, as a layer.
layer() {
    local file=$work/out/$1
    echo "image: layer ${1#*-}" >&2
    mkfifo "$work/sum" "$work/count"
    sha256sum <"$work/sum" | cut -d' ' -f1 >"$file.diffid" &
    wc -c <"$work/count" >"$file.size" &
    tar --create --directory="$2" --sort=name --owner=0 --group=0 --numeric-owner --mtime=@0 --mode=u=rwX,go=rX \
        --format=posix --pax-option=delete=atime,delete=ctime . | tee "$work/sum" "$work/count" | pigz -6 -n >"$file.tar.gz"
    wait
    rm "$work/sum" "$work/count"
}
size() { cat "$work"/out/*.tar.gz | wc -c; }

number=6
if [ "$(size)" -lt "$wanted" ]; then
    mkdir -p "$work/files/opt"
    cp -al "$(dirname "$demo")/wheels" "$work/files/opt/packages"
    layer "0$number-packages" "$work/files"
    number=$((number + 1))
    rm -rf "$work/files/opt"
fi
for archive in 03-data 04-ml; do
    [ "$(size)" -lt "$wanted" ] || break
    mkdir -p "$work/files/opt/archives"
    gzip -dc "$demo/$archive.tar.gz" >"$work/files/opt/archives/$archive.tar"
    layer "0$number-archive" "$work/files"
    number=$((number + 1))
    rm -rf "$work/files/opt"
done
[ "$(size)" -ge "$wanted" ] || { echo "larger.sh: all there is comes to less than $1 GB" >&2; exit 1; }
touch "$work/out/complete"
rm -rf "$out"
mv "$work/out" "$out"
echo "$out"
