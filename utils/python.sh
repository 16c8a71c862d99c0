# shellcheck shell=sh
# Sourced by the launchers: sets $python to an interpreter that has the packages of the files in $requirements.
# Takes the one on the path if it has them all. Else it stops where an environment is active, which is the user's
# choice, and takes .venv here otherwise, into which it installs what is missing.

# shellcheck disable=SC2086,SC2154  # a list of files, set by the launcher
lacking() { "$1" utils/check_requirements.py $requirements; }

python=$(command -v python3 || command -v python) || {
    echo "error: no python3 on the path; install Python 3.10 or newer" >&2
    exit 2
}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
    echo "error: $python is older than 3.10; put a newer python3 on the path" >&2
    exit 2
fi
if ! missing=$(lacking "$python"); then
    install="-m pip install --quiet$(printf ' --requirement %s' $requirements)"
    environment=${VIRTUAL_ENV:-}
    case ${CONDA_DEFAULT_ENV:-base} in base) ;; *) environment=${environment:-$CONDA_PREFIX} ;; esac
    if [ -n "$environment" ]; then
        echo "error: the active environment $environment lacks $missing; $python $install adds them, and without an" \
            "active environment .venv is made here" >&2
        exit 2
    fi
    found=$python python=.venv/bin/python
    if ! { [ -x $python ] && lacking $python >/dev/null; }; then
        echo "$found lacks $missing: installing into .venv, once (a few minutes, about 6 GB with PyTorch)"
        if ! { { [ -x $python ] || "$found" -m venv .venv; } && $python $install; }; then
            echo "error: could not install ${requirements} into .venv; see above" >&2
            exit 2
        fi
    fi
    echo "using .venv/bin/python"
fi
