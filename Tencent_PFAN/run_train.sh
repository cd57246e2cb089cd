#!/bin/sh
# The published runs on Tencent-News. sh Tencent_PFAN/run_train.sh [t2i|i2t] [further flags of train_whole.py]
#   sh Tencent_PFAN/run_train.sh             words attend to regions
#   sh Tencent_PFAN/run_train.sh i2t         regions attend to words
set -eu
cd "$(dirname "$0")/.."
cross_attn=t2i
case "${1-}" in t2i | i2t) cross_attn=$1 && shift ;; esac
case $cross_attn in t2i) lambda_softmax=9 ;; i2t) lambda_softmax=4 ;; esac
run=./runs/tencent_data/$cross_attn/
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"
set -x
exec python -m Tencent_PFAN.train_whole --data_path ./data/ --data_name tencent_data --vocab_path ./vocab/ \
    --logger_name "$run" --model_name "$run" --max_violation --bi_gru --agg_func=Mean --cross_attn=$cross_attn \
    --lambda_softmax=$lambda_softmax --num_epochs=30 --lr_update=15 --learning_rate=.0002 --embed_size=512 \
    --batch_size=128 --val_step=2000000 --lambda_whole=2 "$@"
