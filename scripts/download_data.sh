#!/bin/sh
# Fetch and unpack the public data: sh scripts/download_data.sh [ITEM …], see --help.
scripts=$(dirname "$0")
python=$scripts/../.venv/bin/python
if [ ! -x "$python" ]; then
    python=python3
    python3 -c 'import numpy, tqdm' 2>/dev/null || {
        echo "error: python3 with numpy and tqdm is needed: pip install -r requirements.txt" >&2
        exit 2
    }
fi
exec "$python" "$scripts/download_data.py" "$@"
