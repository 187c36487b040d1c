#!/usr/bin/env bash
# Sets the project up, then checks it: ruff, mypy, pytest.
#
#     bash tests/run.sh                  all tests but those marked slow, gpu, slurm or hosts (pyproject.toml says what
#                                        each mark means)
#     bash tests/run.sh --all            all tests but those for a GPU
#     bash tests/run.sh ARGUMENTS...     any other arguments go to pytest, which then chooses the tests
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

case "${1-}" in
    --all) chosen=(-m 'not gpu' "${@:2}") ;;
    "") chosen=(-m 'not slow and not gpu and not slurm and not hosts') ;;
    *) chosen=("$@") ;;
esac

bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1           # a test that reaches for the hub is wrong, here too
export TOKENIZERS_PARALLELISM=false
export PYTHONUTF8=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tests start several processes on the same cores
# Without this DeepSpeed looks for a GPU on a machine that has none, and says so at length.
[[ -e /dev/nvidiactl || -e /dev/kfd ]] || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"

stage() { printf '\n== %s\n' "$*"; "$@"; }
stage ruff check
stage ruff format --check
stage mypy
stage python -m pytest "${chosen[@]}" < /dev/null
