#!/bin/sh
# Flickr8k from its files to recalls with intervals: captions, features, vocabulary, check, training, evaluation.
#   sh scripts/flickr8k.sh PHOTOS CAPTIONS LISTS [BOXES] [t2i|i2t] [attention|area|none] [seed=N] [flags of train.py]
# PHOTOS    a folder of the photographs, or a .tar of them
# CAPTIONS  Flickr8k.token.txt, captions.txt, or your own: file name, tab, caption
# LISTS     a folder with Flickr_8k.trainImages.txt, .devImages.txt, .testImages.txt, or train_ids.txt, dev_ids.txt, …
# BOXES     the boxes of a detector, .npz or COCO JSON (see extract_features.py --help); else 36 fixed windows
# The variables OUT (default .), NAME (flickr8k, flickr8k_windows without BOXES) and RUN (say, t2i_attention_seed0) name
# where data/NAME, vocab/NAME_vocab.json and runs/NAME/RUN lie. Started again, it goes on where it was stopped.
set -eu
usage() {
    sed -n '2,3p' "$0" | cut -c3- >&2
    echo "error: $1" >&2
    exit 2
}
[ $# -ge 3 ] || usage "expected PHOTOS CAPTIONS LISTS, found $# words"
for path in "$1" "$2" "$3"; do [ -e "$path" ] || usage "$path: no such file"; done
photos=$(realpath "$1") captions=$(realpath "$2") lists=$(realpath "$3")
shift 3
boxes=windows cross_attn=t2i position=attention seed=0
while [ $# -gt 0 ]; do
    case "$1" in
        t2i | i2t) cross_attn=$1 ;;
        attention | area | none) position=$1 ;;
        seed=*) seed=${1#seed=} ;;
        -*) break ;;
        *) [ -f "$1" ] || usage "$1: no such file of boxes"; boxes=$(realpath "$1") ;;
    esac
    shift
done
case $cross_attn in t2i) lambda_softmax=9 ;; i2t) lambda_softmax=4 ;; esac
case $boxes in
    windows) name=${NAME:-flickr8k_windows} more= ;;
    *) name=${NAME:-flickr8k} more="--boxes 13 --windows 10 --whole_region" ;; # the last of the windows is the whole image
esac
out=$(realpath "${OUT:-$(dirname "$0")/..}")
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] && PATH="$PWD/.venv/bin:$PATH"
data=$out/data/$name run=$out/runs/$name/${RUN:-${cross_attn}_${position}_seed$seed}
flags="$cross_attn $position $seed $*"
set -- --data_path "$out/data" --data_name "$name" --vocab_path "$out/vocab" \
    --logger_name "$run" --model_name "$run" --resume auto --save_step 100 --keep_last 1 --log_step 50 --workers 1 \
    --img_dim 512 --embed_size 256 --num_epochs 5 --lr_update 4 --learning_rate 0.001 --batch_size 128 \
    --mean_warmup_epochs 1 --max_violation --bi_gru --agg_func Mean --val_step 1000000 \
    --cross_attn "$cross_attn" --lambda_softmax "$lambda_softmax" --position "$position" --seed "$seed" "$@"
# a flag that train.py does not take is named now, not after an hour of features
python -c 'import lib.errors, train; lib.errors.run(lambda: train.check(train.get_parser().parse_args()))' "$@"

show() { # the command, then what it says
    printf '+'; printf ' %s' "$@"; echo
    "$@"
}
list() { # the list of a split under one of its names
    for path in "$lists/${1}_ids.txt" "$lists/Flickr_8k.${1}Images.txt"; do
        [ -f "$path" ] && echo "$path" && return
    done
    usage "$lists: no ${1}_ids.txt or Flickr_8k.${1}Images.txt"
}
train_ids=$(list train)
dev_ids=$(list dev)
test_ids=$(list test)
n=$(cat "$train_ids" "$dev_ids" "$test_ids" | grep -c .)
n_train=$(grep -c . "$train_ids")
echo "$n photographs, $n_train of them to train; on one idle CPU core about $((n * 50 / 8000 + 2)) min for features and"
echo "their checks, $((n_train * 12 / 6000 + 1)) min to train (5 epochs, embed_size 256), $((n / 4000 + 1)) min to evaluate"
mkdir -p "$data" "$run"
[ -f "$run/flags.txt" ] && [ "$(cat "$run/flags.txt")" != "$flags" ] &&
    usage "$run: made with '$(cat "$run/flags.txt")', found '$flags'; RUN=NAME names another run"
echo "$flags" >"$run/flags.txt"

if [ -f "$photos" ]; then
    [ -f "$out/data/photos.unpacked" ] || { mkdir -p "$out/data/photos" && show tar -xf "$photos" -C "$out/data/photos"; }
    touch "$out/data/photos.unpacked"
    photos=$out/data/photos
fi
[ -f "$data/test_caps.txt" ] || show python scripts/captions_to_dataset.py --tsv "$captions" \
    --ids "train=$train_ids" "dev=$dev_ids" "test=$test_ids" --out "$data"
for network in lite0 lite2; do
    show python scripts/extract_features.py --images "$photos" --out "$data.$network" \
        --ids "train=$data/train_ids.txt" "dev=$data/dev_ids.txt" "test=$data/test_ids.txt" \
        --regions "$boxes" $more --backbone "efficientnet_$network" --float16 --pixel_boxes
done
show python scripts/reduce_features.py "$data.lite0" "$data.lite2" --out "$data" --dimensions 512
[ -f "$out/vocab/${name}_vocab.json" ] || show python vocab.py --data_path "$out/data" --data_name "$name" \
    --vocab_path "$out/vocab"
show python scripts/check_data.py "$data" --vocab_path "$out/vocab"
show python train.py "$@"
show python evaluation.py --model_path "$run/model_best.pth.tar" --data_path "$out/data" --vocab_path "$out/vocab" \
    --split test --intervals
