#!/usr/bin/env bash
# A process for each GPU of this machine:
#   experiments/clusters/one_machine.sh 4 pretrain --config large_lora --data DIR --output RUN
# (A single process on all GPUs, which needs no script, is as fast; this is how a run of several is tried.)
# A signal to the script goes to the processes. Its exit status is that of the last one that failed.
set -uo pipefail
processes=$1
shift
port=${PORT:-29400}
started=()
for ((process = 0; process < processes; process++)); do
    CUDA_VISIBLE_DEVICES=$process behrt-jax "$@" --distributed.coordinator "localhost:$port" \
        --distributed.processes "$processes" --distributed.process "$process" &
    started+=($!)
done
trap 'kill -TERM "${started[0]}"' TERM INT USR1 # one is enough: they stop together
status=0
for process in "${started[@]}"; do
    while :; do
        wait "$process"
        code=$?
        kill -0 "$process" 2>/dev/null || break # else a signal came, and the process goes on
    done
    ((code == 0)) || status=$code
done
exit "$status"
