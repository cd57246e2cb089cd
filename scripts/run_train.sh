#!/bin/sh
# The published runs. sh scripts/run_train.sh [f30k|coco] [t2i|i2t] [attention|area] [small] [further flags of train.py]
#   sh scripts/run_train.sh                  Flickr30K, t2i, PFAN-A
#   sh scripts/run_train.sh coco i2t area    MS-COCO, i2t, PFAN-P
#   sh scripts/run_train.sh f30k t2i small   PFAN-A with cells' embeddings that start small, as docs/flickr8k.md has it
# Where it was started before it refuses to: --resume auto goes on with that run, --overwrite begins anew.
set -eu
cd "$(dirname "$0")/.."
data=f30k cross_attn=t2i position=attention small=
while [ $# -gt 0 ]; do
    case "$1" in
        f30k | coco) data=$1 ;;
        t2i | i2t) cross_attn=$1 ;;
        attention | area) position=$1 ;;
        small) small=_small ;;
        *) break ;;
    esac
    shift
done
case $data in f30k) learning_rate=.0002 ;; coco) learning_rate=.0005 ;; esac
case $cross_attn in t2i) lambda_softmax=9 ;; i2t) lambda_softmax=4 ;; esac
run=./runs/${data}_precomp/${cross_attn}_$position$small/
[ -z "$small" ] || set -- --position_init=0.02 --mean_warmup_epochs=1 "$@"
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"
set -x
exec python train.py --data_path ./data/ --data_name "${data}_precomp" --vocab_path ./vocab/ \
    --logger_name "$run" --model_name "$run" --max_violation --bi_gru --agg_func=Mean --cross_attn=$cross_attn \
    --lambda_softmax=$lambda_softmax --num_epochs=30 --lr_update=15 --learning_rate=$learning_rate --embed_size=1024 \
    --batch_size=128 --val_step=2000000 --position=$position "$@"
