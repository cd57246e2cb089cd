# Sourced by the other scripts, from the repository's root: install the requirements files named in "$@" into .venv
# unless that has been done, and put it on the PATH.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}" # threads that wait for each other do not burn a busy core
if ! [ -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "${PYTHON:-python3}: expected Python 3.11 or newer (PYTHON=python3.12 sh … names another)" >&2
        exit 2
    }
    "${PYTHON:-python3}" -m venv .venv
fi
for requirements in "$@"; do
    done_mark=".venv/$requirements"
    if ! cmp -s "$requirements" "$done_mark"; then
        echo "+ .venv/bin/pip install -r $requirements"
        .venv/bin/pip install --disable-pip-version-check -q -r "$requirements"
        cp "$requirements" "$done_mark"
    fi
done
PATH="$PWD/.venv/bin:$PATH"
