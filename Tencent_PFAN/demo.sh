#!/bin/sh
# The whole Tencent-News flow on drawn images: data, training, servers, client, MAP@1-3 and A@1-3 beside chance.
#   sh Tencent_PFAN/demo.sh [further flags of scripts/demo/make_tencent_demo.py]
# In the environment: OUT, the folder for all of it; TRAIN_FLAGS, further flags of train_whole.py; SENTENCE_PORT and
# TAG_PORT, the servers' ports.
set -eu
cd "$(dirname "$0")/.."
install() { . scripts/venv.sh; }
install requirements.txt
out=${OUT:-runs/tencent_demo}
export SENTENCE_PORT="${SENTENCE_PORT:-5091}" TAG_PORT="${TAG_PORT:-5092}"
started=$(date +%s)
show() { echo "+ $*" && "$@"; }

show python scripts/demo/make_tencent_demo.py --out "$out" "$@"
# small batches: among more images, the hardest negatives alone teach a new model nothing for many epochs
for kind in sentence tag; do
    case $kind in sentence) name=tencent_data ;; tag) name=tencent_data_tag ;; esac
    show python Tencent_PFAN/vocab.py --data_path "$out/data" --data_name $name --vocab_path "$out/vocab" --overwrite
    show python Tencent_PFAN/train_whole.py --data_path "$out/data" --data_name $name --vocab_path "$out/vocab" \
        --logger_name "$out/$kind" --model_name "$out/$kind" --max_violation --bi_gru --agg_func=Mean \
        --cross_attn=t2i --lambda_softmax=9 --lambda_whole=2 --embed_size=128 --word_dim=64 --batch_size=16 \
        --learning_rate=.001 --num_epochs=12 --lr_update=10 --val_step=2000000 --workers=1 --overwrite ${TRAIN_FLAGS-}
done

log=$out/servers.log
: >"$log"
sh Tencent_PFAN/run_server.sh "$out/sentence/model_best.pth.tar" "$out/tag/model_best.pth.tar" \
    --demo_path "$out/data/tencent_data_meta" >"$log" 2>&1 &
servers=$!
stop() {
    kill -TERM "$servers" 2>/dev/null || :
    wait "$servers" 2>/dev/null || :
}
trap 'stop' EXIT
trap 'exit 130' INT TERM HUP
echo "+ sh Tencent_PFAN/run_server.sh $out/sentence/model_best.pth.tar $out/tag/model_best.pth.tar"
until grep -q '^ready: ' "$log"; do
    kill -0 "$servers" 2>/dev/null || { cat "$log" >&2 && exit 1; }
    sleep 0.3
done

meta=$out/data/tencent_data_meta
rm -f "$out"/dist_*.json "$out"/dist_*.json.part
show python test_server/test.py "$out/dist_sentence_t2i.json" sentence "$SENTENCE_PORT" --data_path "$meta"
show python test_server/test.py "$out/dist_tag_t2i.json" tag "$SENTENCE_PORT" --data_path "$meta"
show python test_server/test.py "$out/dist_tag_new_t2i.json" tag "$TAG_PORT" --data_path "$meta"
echo "+ python test_server/compute_map.py (of all three together into $out/mixed.txt, and of each alone)"
for name in sentence tag tag_new; do
    python test_server/compute_map.py "$out/dist_${name}_t2i.json" --test_list "$meta/test_list.json" >"$out/$name.txt"
done
python test_server/compute_map.py "$out/dist_tag_t2i.json" "$out/dist_sentence_t2i.json" "$out/dist_tag_new_t2i.json" \
    --test_list "$meta/test_list.json" >"$out/mixed.txt"
stop
python scripts/demo/make_tencent_demo.py --out "$out" --beside_chance \
    "$out/sentence.txt" "$out/tag.txt" "$out/tag_new.txt" "$out/mixed.txt"
echo "took $(($(date +%s) - started)) seconds; to look at the items in a browser, on http://127.0.0.1:$SENTENCE_PORT :"
echo "  sh Tencent_PFAN/run_server.sh $out/sentence/model_best.pth.tar $out/tag/model_best.pth.tar --demo_path $meta"
