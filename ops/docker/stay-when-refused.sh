#!/bin/sh
# stay-when-refused COMMAND [ARGUMENT…]: run a command; if it ends with exit code 2, stay until stopped.
#
# With exit code 2 a command of `smes` refuses what it was given: a wrong key, or a checkpoint of another schema. It has
# said what to do. It would say the same after each restart, and Docker's restart policies do not look at exit codes. So
# the container stays, without a process of `smes` and therefore unhealthy, and what was said stays the last line.
set -u

trap 'stopped=1; kill -TERM "$child" 2>/dev/null' TERM INT
stopped=
"$@" &
child=$!
wait "$child"
code=$?
# A signal ends wait, not the command: it may have much to do before it ends.
while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    code=$?
done
[ "$code" -ne 2 ] && exit "$code"

echo "refused (exit code 2): this container waits and tries nothing more; change what is named above, start it anew" >&2
while [ -z "$stopped" ]; do
    sleep 86400 &
    child=$!
    wait "$child"
done
exit 2
