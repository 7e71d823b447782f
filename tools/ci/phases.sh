# Sourced by the scripts here: runs named phases and prints at the end how the time went.

phase_log=() background_pid=

# phase NAME COMMAND…: runs the command; a failure ends the script, telling the phase.
phase() {
    local name=$1 start=$SECONDS
    shift
    printf '\n==> %s\n' "$name"
    "$@" || { local status=$?; echo "==> $name failed after $((SECONDS - start)) s" >&2; exit "$status"; }
    phase_log+=("$(printf '%6d s  %s' $((SECONDS - start)) "$name")")
}

# background NAME COMMAND…: the same, beside what follows; `finish` waits for it. Its output goes to a log, shown when it fails. Whatever ends
# the script before that ends the command with all its processes.
background() {
    background_name=$1
    shift
    background_log=$(mktemp)
    background_start=$SECONDS
    trap end_background EXIT
    set -m # a process group of its own, by which all of it can be ended
    { "$@" && echo "$SECONDS" >"$background_log.end"; } >"$background_log" 2>&1 &
    background_pid=$!
    set +m
}

end_background() {
    if [ -n "$background_pid" ]; then
        kill -- "-$background_pid" 2>/dev/null || true
        wait "$background_pid" 2>/dev/null || true
    fi
    rm -f "$background_log" "$background_log.end"
}

finish() {
    local status=0
    wait "$background_pid" || status=$?
    background_pid=
    if [ "$status" != 0 ]; then
        tail -n 40 "$background_log" >&2
        echo "==> $background_name failed" >&2
        exit "$status"
    fi
    phase_log+=("$(printf '%6d s  %s (beside the others)' $(($(cat "$background_log.end") - background_start)) "$background_name")")
    rm -f "$background_log" "$background_log.end"
}

phase_summary() {
    printf '\nhow the time went:\n'
    printf '%s\n' "${phase_log[@]}"
    printf '%6d s  in all\n' "$SECONDS"
}
