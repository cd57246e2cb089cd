#!/bin/sh
# Fetches, unpacks and checks the public data. `sh scripts/download_data.sh --help` says how.
set -u

usage() {
    cat <<'HELP'
usage: sh scripts/download_data.sh [ITEM …] [--data_path ./data/] [--vocab_path ./vocab/] [--model_path ./runs/]

Fetches the public data, unpacks it into the folders that training and scoring read, checks every file and prints a
table of what is there. Without an ITEM nothing is fetched: the table shows what is there and how to get the rest.

  f30k      region positions for Flickr30K                 → data/f30k_precomp/SPLIT_boxes.npy
  coco      region positions for MS-COCO                   → data/coco_precomp/SPLIT_boxes.npy
  scan      SCAN's features, captions and vocabularies of both; needs a Kaggle login: the `kaggle` command is used
            where it is set up, else you are told what to fetch by hand (tens of GB)
                                                           → data/*_precomp/SPLIT_{ims.npy,caps.txt}, vocab/
  tencent   Tencent-News, training and test data           → data/tencent_data/, data/tencent_data_meta/
  models    trained Tencent-News models                    → runs/{sentence,tag}_t2i.pth.tar
  all       all of these

To train on Flickr30K get `f30k scan`, on MS-COCO `coco scan`, on Tencent-News `tencent`.
Archives are kept in data/downloads/ until you delete them; a broken-off transfer goes on where it stopped when you
run the same command again. Files that are already in place are neither fetched nor overwritten.
Set PFAN_DRIVE_URL to fetch from a mirror: a file is asked for as $PFAN_DRIVE_URL?id=…&export=download&confirm=t
(the default is https://drive.usercontent.google.com/download).
Exit status: 0 if everything asked for is there, else 2 with one line on stderr for each part that is not.

example: sh scripts/download_data.sh f30k scan
HELP
}

die() {
    echo "error: $*" >&2
    exit 2
}

# Files on Google Drive: the id of each part. A part's archive is kept as data/downloads/PART.
drive_id() {
    case $1 in
        f30k) echo 1ZiF1IoeExPcn9V9L78X6jEYuMxR96OLO ;;
        coco) echo 1DaCZxeXOCm05u-Gf-_MG_zSNKO1UxBat ;;
        tencent_train) echo 1WKq05mhSMc2u0SLtCWkUzgmqTLx95kXR ;;
        tencent_test) echo 1dPyo2EBHQoHkqx-Dl4R7ISb8t-rVG_KK ;;
        models) echo 1SA2J8-m6w6HvbXyDkOtjLcD7Tw4A9hPn ;;
    esac
}

size() {
    if [ -f "$1" ]; then wc -c <"$1" | tr -d ' '; else echo 0; fi
}

# No archive begins with "<", every web page does.
is_page() {
    [ "$(head -c 64 "$1" 2>/dev/null | tr -d '\0 \t\r\n' | head -c 1)" = "<" ]
}

# fetch_drive PART ARCHIVE: Google Drive → ARCHIVE, through ARCHIVE.part. Returns 1 after one line on stderr.
fetch_drive() {
    id=$(drive_id "$1")
    url="$drive_url?id=$id&export=download&confirm=t" # confirm=t: yes, although it is too large for a virus scan
    part=$2.part
    progress=-s
    [ -t 2 ] && progress=--progress-bar
    for try in 1 2 3; do
        is_page "$part" && rm -f "$part"
        echo "$1: curl -fL -C - -o $part '$url'"
        answer=$(curl "$progress" -fL -C - -o "$part" --connect-timeout 30 --speed-limit 100 --speed-time 60 \
            -w '%{http_code} %{url_effective} %{content_type}' "$url")
        status=$?
        case $status in 18 | 28 | 52 | 55 | 56) ;; *) break ;; esac # all but a broken-off transfer
        [ "$try" = 3 ] || sleep 1
    done
    why=
    case "$status $answer" in
        0\ *\ text/html* | 33\ *\ text/html*) why="got a web page instead of the file" ;; # 33: it does not resume
        18\ * | 28\ * | 52\ * | 55\ * | 56\ *)
            echo "error: $1: the transfer broke off, $(size "$part") bytes are here; run this again to go on" >&2
            return 1
            ;;
        22\ 416\ * | 33\ *)
            echo "error: $1: the server cannot go on after $(size "$part") bytes; delete $part and run this again" >&2
            return 1
            ;;
        22\ *) why="got HTTP status ${answer%% *}" ;;
        5\ * | 6\ * | 7\ * | 35\ *) why="cannot reach $drive_url (curl status $status)" ;;
        0\ *) ;;
        *) why="curl failed with status $status" ;;
    esac
    if is_page "$part"; then
        why="got a web page instead of the file"
        grep -qiE 'quota|too many users' "$part" && why="got Google's 'download quota exceeded' page"
        grep -qiE 'ServiceLogin|accounts\.google\.com/' "$part" && why="got a login page, the file is not public"
        rm -f "$part"
    fi
    if [ "$why" ]; then
        echo "error: $1: $why; fetch https://drive.google.com/file/d/$id/view in a browser," \
            "save it as $2 and run this again" >&2
        return 1
    fi
    mv "$part" "$2"
}

# fetch_kaggle PART ARCHIVE: SCAN's data → ARCHIVE. Returns 1 after one line on stderr.
fetch_kaggle() {
    set -- "$1" "$2" "log in at https://www.kaggle.com/datasets/kuanghueilee/scan-features, download the archive, \
save it as $2 and run this again"
    if ! command -v kaggle >/dev/null; then
        echo "error: $1: the kaggle command is not installed; $3" >&2
        return 1
    fi
    echo "$1: kaggle datasets download -d kuanghueilee/scan-features -p $2.kaggle"
    if kaggle datasets download -d kuanghueilee/scan-features -p "$2.kaggle" &&
        mv "$2.kaggle"/*.zip "$2"; then
        rmdir "$2.kaggle"
    else
        echo "error: $1: kaggle failed; set up its login (https://www.kaggle.com/docs/api) or $3" >&2
        return 1
    fi
}

helper() {
    "$python" "$root/scripts/download_data.py" "$@" \
        --data_path "$data_path" --vocab_path "$vocab_path" --model_path "$model_path"
}

root=$(cd "$(dirname "$0")/.." && pwd) || exit 2
drive_url=${PFAN_DRIVE_URL:-https://drive.usercontent.google.com/download}
data_path=./data vocab_path=./vocab model_path=./runs
parts=
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help)
            usage
            exit
            ;;
        --data_path | --vocab_path | --model_path)
            [ $# -ge 2 ] || die "$1 needs a folder"
            eval "${1#--}=\$2"
            shift
            ;;
        --data_path=* | --vocab_path=* | --model_path=*)
            name=${1%%=*}
            eval "${name#--}=\${1#*=}"
            ;;
        f30k | coco | scan | models) parts="$parts $1" ;;
        tencent) parts="$parts tencent_train tencent_test" ;;
        all) parts="f30k coco scan tencent_train tencent_test models" ;;
        *) die "$1: expected f30k, coco, scan, tencent, models, all or an option (see --help)" ;;
    esac
    shift
done

python=$root/.venv/bin/python
if [ ! -x "$python" ]; then
    python=python3
    python3 -c 'import numpy' 2>/dev/null || die "python3 with numpy is needed: pip install -r requirements.txt"
fi

trap 'exit 130' INT
result=0
for item in $parts; do
    helper has "$item" && continue
    archive=${data_path%/}/downloads/$item
    mkdir -p "${archive%/*}" || exit 2
    if [ ! -f "$archive" ]; then
        case $item in
            scan) fetch_kaggle "$item" "$archive" ;;
            *)
                command -v curl >/dev/null || die "curl is needed to fetch $item"
                fetch_drive "$item" "$archive"
                ;;
        esac || {
            result=2
            continue
        }
    fi
    helper unpack "$item" "$archive" || result=2
done
# shellcheck disable=SC2086 # one word a part
helper table $parts || result=2
exit $result
