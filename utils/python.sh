# shellcheck shell=sh
# Sourced by the launchers: sets $python to an interpreter that has everything in requirements.txt.
# Takes the one on the path if it has it all, else .venv here, which is made on the first run.

has_requirements() { "$1" utils/check_requirements.py requirements.txt 2>/dev/null; }

python=$(command -v python3 || command -v python) || {
    echo "error: no python3 on the path; install Python 3.10 or newer" >&2
    exit 2
}
if ! has_requirements "$python"; then
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
        echo "error: $python is older than 3.10; put a newer python3 on the path" >&2
        exit 2
    fi
    if ! has_requirements .venv/bin/python; then
        echo "$python lacks requirements: installing them into .venv, once (a few minutes, about 6 GB)"
        if ! { "$python" -m venv .venv && .venv/bin/python -m pip install --quiet --requirement requirements.txt; }; then
            echo "error: could not install requirements.txt into .venv; see above" >&2
            exit 2
        fi
    fi
    echo "using .venv/bin/python"
    python=.venv/bin/python
fi
