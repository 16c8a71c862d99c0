#!/bin/sh
# Check everything: ruff, shellcheck, and the tests. Arguments go to pytest, e.g. sh test.sh tests/training/test_engine.py
set -eu
CDPATH='' cd -- "$(dirname -- "$0")"

requirements="requirements.txt requirements-dev.txt"
. utils/python.sh
"$python" -m ruff check .
"$python" -m ruff format --check .
"$(dirname "$("$python" -c 'import sys; print(sys.executable)')")/shellcheck" -x ./*.sh utils/python.sh tests/fakecuda/build.sh .ci/run
exec "$python" -m pytest -q -n auto "$@"
