#!/usr/bin/env bash
# Sets the project up, then checks it: ruff, pytest, and mypy beside it.
#
#     bash tests/run.sh                  all tests but those marked slow, turn, gpu, slurm or hosts (pyproject.toml says
#                                        what each mark means)
#     bash tests/run.sh --all [--turn T] all tests but those for a GPU; of those marked turn the part of this commit's
#                                        tree, or of T, or with --turn all each (tests/turns.py)
#     bash tests/run.sh ARGUMENTS...     any other arguments go to pytest, which then chooses the tests
#
# WORKERS=1 runs one test at a time; by default as many as there are cores, up to 4. COVERAGE=1 tells at the end which lines
# of dist_lora ran, in the tests and in the processes that they start.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1           # a test that reaches for the hub is wrong, here too
export TOKENIZERS_PARALLELISM=false
export PYTHONUTF8=1
unset PYTHONDONTWRITEBYTECODE # set in many images: then each process compiles anew all that it imports
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tests start several processes on the same cores
# Without this DeepSpeed looks for a GPU on a machine that has none, and says so at length.
[[ -e /dev/nvidiactl || -e /dev/kfd ]] || export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"

cores=$(env -u OMP_NUM_THREADS nproc) # which says that number where it is set
# A file stays with one worker, so what its tests share is made once; the long ones come first.
workers=(--numprocesses "${WORKERS:-$((cores < 4 ? cores : 4))}" --dist loadfile --no-loadscope-reorder)
python=(python)
if [[ ${COVERAGE:-} == 1 ]]; then
    python=(python -m coverage run)
    rm -rf .cache/coverage && mkdir -p .cache/coverage
fi

stage() { printf '\n== %s\n' "$*"; "$@"; }
pytest() { stage "${python[@]}" -m pytest "$@" < /dev/null; }
types=$(mktemp)
at_the_end() { # what mypy found is told also where a test failed
    local code=$?
    printf '\n== mypy\n'
    wait "$mypy" || code=1
    cat "$types"
    rm "$types"
    exit "$code"
}
stage ruff check
stage ruff format --check
mypy > "$types" 2>&1 & # beside the tests, whose processes often wait for each other
mypy=$!
trap at_the_end EXIT
case "${1-}" in
    --all)
        pytest "${workers[@]}" -m 'not gpu and not slurm and not hosts' "${@:2}"
        pytest -m 'slurm or hosts' "${@:2}" # clusters on this machine: one after the other
        ;;
    "") pytest "${workers[@]}" -m 'not slow and not turn and not gpu and not slurm and not hosts' ;;
    *) pytest "$@" ;;
esac
if [[ ${COVERAGE:-} == 1 ]]; then
    stage python -m coverage combine --quiet
    stage python -m coverage report --skip-covered
fi
