#!/bin/sh
# Rank the test split with the t2i and i2t models of scripts/run_train.sh together, the published tables' rows.
#   sh scripts/run_eval.sh [f30k|coco] [attention|area] [small] [further flags of evaluation.py]
# It needs both trainings: sh scripts/run_train.sh f30k t2i attention, and the same with i2t.
# MS-COCO is ranked on the 1,000 images of test, and where testall has positions, on all 5,000 and in five folds.
set -eu
cd "$(dirname "$0")/.."
data=f30k position=attention small=
while [ $# -gt 0 ]; do
    case "$1" in
        f30k | coco) data=$1 ;;
        attention | area) position=$1 ;;
        small) small=_small ;;
        *) break ;;
    esac
    shift
done
runs=runs/${data}_precomp
for cross_attn in t2i i2t; do
    [ -f "$runs/${cross_attn}_$position$small/model_best.pth.tar" ] && continue
    echo "error: $runs/${cross_attn}_$position$small/model_best.pth.tar: no such file;" \
        "sh scripts/run_train.sh $data $cross_attn $position${small:+ small} makes it" >&2
    exit 2
done
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"
rank() {
    set -x
    python evaluation.py --data_path ./data/ --vocab_path ./vocab/ \
        --model_path "$runs/t2i_$position$small/model_best.pth.tar" "$runs/i2t_$position$small/model_best.pth.tar" "$@"
    { set +x; } 2>/dev/null
}
rank --split test "$@"
[ "$data" = coco ] || exit 0
if [ -f data/coco_precomp/testall_boxes.npy ]; then
    rank --split testall --fold5 "$@"
    rank --split testall "$@"
else
    cat <<'HELP'
note: testall (five folds of 1,000 images, and all 5,000) is not ranked: data/coco_precomp/testall_boxes.npy is missing.
PFAN published no positions for it. The bottom-up-attention files give them, in the order of SCAN's features:
  python scripts/captions_to_dataset.py --karpathy dataset_coco.json --out data/coco_tsv
  python scripts/tsv_to_dataset.py trainval/karpathy_*.tsv* --ids testall=data/coco_tsv/testall_ids.txt --out data/coco_tsv
  python scripts/align.py --reference data/coco_precomp --source data/coco_tsv --splits testall --out data/coco_precomp
HELP
fi
