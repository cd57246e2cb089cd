#!/bin/sh
# Start the sentence model on port 5091 and the tag model on 5092; Ctrl-C stops both.
#   sh Tencent_PFAN/run_server.sh [SENTENCE.pth.tar [TAG.pth.tar]] [further flags of scan_server_whole]
#   sh Tencent_PFAN/run_server.sh --demo_path runs/tencent_demo/data/tencent_data_meta
# SENTENCE_PORT and TAG_PORT in the environment choose other ports.
set -eu
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"
case " $* " in *" --help "* | *" -h "*) exec python -m Tencent_PFAN.scan_server_whole --help ;; esac
sentence=./runs/sentence_t2i.pth.tar tag=./runs/tag_t2i.pth.tar
case "${1---}" in -*) ;; *) sentence=$1 && shift ;; esac
case "${1---}" in -*) ;; *) tag=$1 && shift ;; esac
for model in "$sentence" "$tag"; do
    [ -e "$model" ] || { echo "error: $model: no such checkpoint, expected one of train_whole.py" >&2 && exit 2; }
done
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # two servers share the cores: idle threads must not burn them

pids= printed=$(mktemp -d) # each server prints its address as soon as it answers
stop() {
    trap '' INT TERM HUP
    [ -z "$pids" ] || kill -TERM $pids 2>/dev/null || :
    for pid in $pids; do wait "$pid" 2>/dev/null || :; done
    rm -r "$printed"
    exit "$1"
}
trap 'stop 0' INT TERM HUP
start() {
    name=$1 && shift
    echo "+ python -m Tencent_PFAN.scan_server_whole $*"
    python -m Tencent_PFAN.scan_server_whole "$@" >"$printed/$name" &
    pids="$pids $!"
}
check() { # stop where a server has ended; with status 2 it has said why
    for pid in $pids; do
        kill -0 "$pid" 2>/dev/null && continue
        status=0
        wait "$pid" || status=$?
        [ "$status" -eq 2 ] && stop 2
        echo "error: a server ended with status $status" >&2 && stop 1
    done
}
start sentence "$sentence" "${SENTENCE_PORT:-5091}" "$@"
start tag "$tag" "${TAG_PORT:-5092}" "$@"
until [ -s "$printed/sentence" ] && [ -s "$printed/tag" ]; do check && sleep 0.3; done
address() { sed 's/.*: //' "$printed/$1"; }
echo "ready: sentences on $(address sentence), tags on $(address tag); Ctrl-C stops both"
while check; do sleep 1 & wait $!; done
