#!/bin/bash
# Installs the Debian packages that the named purposes (build, test, demo, bench, fuzz) need and that are not there yet.
#
# Asks for what a package gives (a program, a file), not for its name, so that a machine with another vendor's containerd keeps it.
# Nothing installed is upgraded or removed, and no service is started.
set -euo pipefail

build=(cc=gcc cmake=cmake /usr/include/stdio.h=libc6-dev make=make pkg-config=pkg-config)
test=(
    containerd=containerd runc=runc docker-registry=docker-registry skopeo=skopeo mkfs.ext4=e2fsprogs
    fsck.erofs=erofs-utils umoci=umoci bsdtar=libarchive-tools /bin/busybox=busybox-static strace=strace man=man-db openssl=openssl getfattr=attr setpriv=util-linux
    /usr/src/linux-source-6.1.tar.xz=linux-source-6.1 flex=flex bison=bison bc=bc xz=xz-utils /usr/include/libelf.h=libelf-dev
)
demo=(
    containerd=containerd runc=runc docker-registry=docker-registry skopeo=skopeo mkfs.ext4=e2fsprogs setpriv=util-linux
    debootstrap=debootstrap pigz=pigz getfattr=attr /usr/lib/python3/dist-packages/pip=python3-pip
)
bench=(igzip=isal)
fuzz=(cc=gcc g++=g++)

PATH=$PATH:/usr/sbin:/sbin
missing=()
for purpose in "$@"; do
    case $purpose in build | test | demo | bench | fuzz) declare -n wanted=$purpose ;; *) echo "packages.sh: no such purpose: $purpose" >&2; exit 2 ;; esac
    for pair in "${wanted[@]}"; do
        gives=${pair%=*} package=${pair##*=}
        case $gives in
            /*) [ -e "$gives" ] && continue ;;
            *) command -v "$gives" >/dev/null && continue ;;
        esac
        [[ " ${missing[*]-} " == *" $package "* ]] || missing+=("$package")
    done
done
[ ${#missing[@]} -gt 0 ] || exit 0

[ "$(id -u)" = 0 ] || { echo "packages.sh: not root, so please install: ${missing[*]}" >&2; exit 1; }
command -v apt-get >/dev/null || { echo "packages.sh: this is not Debian, so please install what gives: ${missing[*]}" >&2; exit 1; }
echo "installing from Debian: ${missing[*]}"

guard=/usr/sbin/policy-rc.d # invoke-rc.d asks it before it starts a service; 101 says no
if [ ! -e "$guard" ]; then
    trap 'rm -f "$guard"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$guard"
    chmod +x "$guard"
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
apt-get -q update >"$log" 2>&1 && apt-get -q install -y --no-install-recommends --no-upgrade --no-remove \
    -o DPkg::Lock::Timeout=600 "${missing[@]}" >>"$log" 2>&1 || { tail -n 20 "$log" >&2; rm -f "$log"; exit 1; }
rm -f "$log"
