#!/bin/sh
# Start the sentence model on port 5091 and the tag model on 5092; Ctrl-C stops both.
#   sh Tencent_PFAN/run_server.sh [SENTENCE.pth.tar [TAG.pth.tar]] [further flags of scan_server_whole]
#   sh Tencent_PFAN/run_server.sh --demo_path runs/tencent_demo/data/tencent_data_meta
# SENTENCE_PORT and TAG_PORT in the environment choose other ports.
set -eu
cd "$(dirname "$0")/.."
sentence=./runs/sentence_t2i.pth.tar tag=./runs/tag_t2i.pth.tar
case "${1---}" in -*) ;; *) sentence=$1 && shift ;; esac
case "${1---}" in -*) ;; *) tag=$1 && shift ;; esac
sentence_port=${SENTENCE_PORT:-5091} tag_port=${TAG_PORT:-5092}
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # two servers share the cores: idle threads must not burn them
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"
host=127.0.0.1 previous=
for word in "$@"; do
    case "$word" in --host=*) host=${word#--host=} ;; esac
    [ "$previous" = --host ] && host=$word
    previous=$word
done
case "$host" in 0.0.0.0) host=127.0.0.1 ;; ::) host=::1 ;; esac
case "$host" in *:*) address="[$host]" ;; *) address=$host ;; esac

pids=
stop() {
    trap '' INT TERM HUP
    status=$1
    [ -z "$pids" ] || kill -TERM $pids 2>/dev/null || :
    for pid in $pids; do wait "$pid" || :; done
    exit "$status"
}
trap 'stop 0' INT TERM HUP
start() {
    echo "+ python -m Tencent_PFAN.scan_server_whole $*"
    python -m Tencent_PFAN.scan_server_whole "$@" &
    pids="$pids $!"
}
start "$sentence" "$sentence_port" "$@"
start "$tag" "$tag_port" "$@"
answers() { # straight to the server, whatever proxies the environment names
    python -c 'import sys, http.client as h; c = h.HTTPConnection(*sys.argv[1:], timeout=2); c.request("GET", "/health")
sys.exit(c.getresponse().status != 200)' "$host" "$1" 2>/dev/null
}
alive() { for pid in $pids; do kill -0 "$pid" 2>/dev/null || return 1; done; }
for port in "$sentence_port" "$tag_port"; do
    until answers "$port"; do
        alive || { echo "error: a server ended, see above" >&2 && stop 1; }
        sleep 1
    done
done
# another server on the same port would have answered too, while ours ended
alive || { echo "error: a server ended, see above" >&2 && stop 1; }
echo "ready: sentences on http://$address:$sentence_port, tags on http://$address:$tag_port; Ctrl-C stops both"
while alive; do sleep 1 & wait $!; done
echo "error: a server ended, see above" >&2
stop 1
