#!/bin/sh
# Rank the test split with the t2i and i2t models of scripts/run_train.sh together, the published tables' rows.
#   sh scripts/run_eval.sh [f30k|coco] [attention|area] [further flags of evaluation.py]
# MS-COCO is ranked twice: the mean over five folds of 1,000 images, then all 5,000.
set -eu
cd "$(dirname "$0")/.."
data=f30k position=attention
while [ $# -gt 0 ]; do
    case "$1" in
        f30k | coco) data=$1 ;;
        attention | area) position=$1 ;;
        *) break ;;
    esac
    shift
done
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"
rank() {
    set -x
    python evaluation.py --data_path ./data/ --vocab_path ./vocab/ --model_path \
        "runs/${data}_precomp/t2i_$position/model_best.pth.tar" "runs/${data}_precomp/i2t_$position/model_best.pth.tar" "$@"
    { set +x; } 2>/dev/null
}
case $data in
    f30k) rank --split test "$@" ;;
    coco)
        rank --split testall --fold5 "$@"
        rank --split testall "$@"
        ;;
esac
