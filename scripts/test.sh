#!/bin/sh
# Lint and all tests; further arguments go to pytest: sh scripts/test.sh tests/test_model.py -k t2i
set -eu
cd "$(dirname "$0")/.."
install() { . scripts/venv.sh; }
install requirements.txt requirements-dev.txt
set -x
ruff check .
pytest -q --durations=10 "$@"
