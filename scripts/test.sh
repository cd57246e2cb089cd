#!/bin/sh
# Lint, format, types, all tests, coverage of the root modules and lib; further arguments go to pytest, which then measures none:
# sh scripts/test.sh tests/test_model.py -k t2i
set -eu
cd "$(dirname "$0")/.."
install() { . scripts/venv.sh; }
install requirements.txt requirements-dev.txt requirements-features.txt
# a process of pytest for each core, at most four; each runs whole files, whose tests share what they train and build
[ $# -gt 0 ] || set -- -n logical --maxprocesses 4 --dist loadfile \
    --cov --cov-report=term-missing:skip-covered --cov-fail-under=90
set -x
ruff check .
ruff format --check .
mypy
pytest -q --durations=10 "$@"
