#!/bin/sh
# Train PFAN on drawn images and rank the test ones, start to finish, in a few minutes on two CPU cores.
#   sh scripts/demo.sh              PFAN-A
#   sh scripts/demo.sh --ablation   PFAN-A, PFAN-P and SCAN side by side
# Further flags are those of train.py.
set -eu
cd "$(dirname "$0")/.."
install() { . scripts/venv.sh; }
install requirements.txt
exec python scripts/demo/run.py "$@"
