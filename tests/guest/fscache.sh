#!/bin/sh
# First process of the guest: one image over fscache, as a node would mount it. Environment: DIR (store, key, expected listing), BIN (where
# the programs are), CHAIN (the image's top chain ID), BIG and RELOADED (paths of large files in it, which must not have been read before the
# kill and the reloads).
# Prints "ok: …" for everything that held and "FAILED: …" for what did not; the test reads the console.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /mnt
mkdir -p /mnt/node /mnt/disk /mnt/m
mount -t ext4 /dev/ubda /mnt/node

finish() { dmesg | grep -iE 'bug:|oops|panic|cachefiles: .*error' && echo "FAILED: the kernel complained"; echo "guest done"; halt -f -p; }
check() { what=$1; shift; if "$@"; then echo "ok: $what"; else echo "FAILED: $what"; grep -v "plain pull" /mnt/slipwayd.log | tail -n 40; finish; fi; }

cat > /mnt/node/slipwayd.toml <<TOML
version = 1
store = "$DIR/store"
state = "/mnt/node/state"
cache = "/mnt/node/cache"
run = "/mnt/node/run"
socket = "/mnt/node/run/slipway.sock"
backend = "fscache"
trusted_keys = ["$DIR/key.pub"]
TOML
"$BIN/slipwayd" run --config /mnt/node/slipwayd.toml > /mnt/slipwayd.log 2>&1 &
holder=$!
# The holder's child; the guest has no /proc/*/children.
worker() { grep -lsE "^PPid:[[:space:]]+$holder\$" /proc/[0-9]*/status | grep -oE '[0-9]+' | head -n 1; }

mounted() { n=0; until "$BIN/slipwayd" mount "$CHAIN" /mnt/m --config /mnt/node/slipwayd.toml 2> /mnt/mount.log; do n=$((n + 1)); [ $n -lt 100 ] || { cat /mnt/mount.log; return 1; }; sleep 0.1; done; }
check "the image is mounted" mounted
erofs_over_fscache() { grep ' - erofs ' /proc/self/mountinfo | grep -q fsid=; }
check "the mount is EROFS over fscache" erofs_over_fscache

# A reader is waiting while the worker is killed: the worker is stopped first, so it cannot have answered.
stopped=$(worker)
check "the worker is stopped" kill -STOP "$stopped"
cat "/mnt/m/$BIG" > /mnt/disk/big &
reader=$!
waits() { n=0; until grep -q cachefiles "/proc/$reader/stack" 2>/dev/null || grep -qE 'fscache|cachefiles|folio|netfs' "/proc/$reader/wchan" 2>/dev/null; do n=$((n + 1)); [ $n -lt 100 ] || { cat "/proc/$reader/status" "/proc/$reader/stack"; return 1; }; sleep 0.05; done; }
check "a reader waits for the worker" waits
kill -9 "$stopped"
check "the reader got its bytes after the worker was killed" wait $reader
check "they are the right bytes" cmp /mnt/disk/big "$DIR/tree/$BIG"
replaced() { [ -n "$(worker)" ] && [ "$(worker)" != "$stopped" ]; }
check "another worker is there" replaced

# Reloads while a reader asks for one range after the other: what the ending worker cannot serve any more is the next one's.
: > /mnt/disk/reloaded
cat "/mnt/m/$RELOADED" > /mnt/disk/reloaded &
reader=$!
# A reload at this many bytes of the file.
reload_at() { n=0; until [ "$(stat -c %s /mnt/disk/reloaded)" -ge "$1" ]; do n=$((n + 1)); [ $n -lt 3000 ] || return 1; sleep 0.01; done; before=$(worker); kill -HUP "$holder"; n=0; until replaced_since "$before"; do n=$((n + 1)); [ $n -lt 600 ] || return 1; sleep 0.05; done; kill -0 $reader 2>/dev/null || echo "the reader was done before the worker"; }
replaced_since() { [ -n "$(worker)" ] && [ "$(worker)" != "$1" ]; }
check "the worker is restarted while a file is read" reload_at 1
check "the worker is restarted again" reload_at 8000000
check "the reader got its bytes although workers were restarted" wait $reader
check "those are the right bytes" cmp /mnt/disk/reloaded "$DIR/tree/$RELOADED"

same() { "$BIN/tree-digest" /mnt/m > /mnt/disk/all && tail -n +2 /mnt/disk/all > /mnt/disk/listing && diff "$DIR/expected" /mnt/disk/listing; }
check "every file is the source's" same

# What the kernel has it serves itself: with the worker stopped, and its own page cache dropped, everything can still be read.
echo 3 > /proc/sys/vm/drop_caches
kill -STOP "$(worker)"
cached() { cmp "/mnt/m/$BIG" "$DIR/tree/$BIG"; }
check "cached bytes need no worker" cached
kill -CONT "$(worker)"

check "the image is unmounted" "$BIN/slipwayd" umount /mnt/m --config /mnt/node/slipwayd.toml
kill "$holder"
check "the daemon ends" wait $holder
finish
