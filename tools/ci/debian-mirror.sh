#!/bin/bash
# Prints the Debian mirror this machine already uses, from apt's own configuration.
set -euo pipefail
mirror=$({ grep -hsoE 'https?://[^ ]+/debian/?( |$)' /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list || true; } |
    tr -d ' ' | sed -n 1p)
[ -n "$mirror" ] || { echo "no Debian mirror is named in /etc/apt" >&2; exit 1; }
echo "$mirror"
