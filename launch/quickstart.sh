#!/usr/bin/env bash
# From nothing to a fine-tuned model, with two processes on this computer, without a GPU:
#
#     bash launch/quickstart.sh
#
# Sets up the project, makes a small model and its data, evaluates, trains with a sharded base, evaluates again. Takes
# 4 to 7 minutes on 2 cores after the set-up. Run again, it starts over: the results of the previous run are removed.
set -euo pipefail
cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."
exec < /dev/null

config=configs/quickstart.yaml
run=runs/quickstart
results=.cache/quickstart

bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"
export HF_HUB_OFFLINE=1 # everything needed is here
export TOKENIZERS_PARALLELISM=false
export PYTHONUTF8=1
unset PYTHONDONTWRITEBYTECODE # set in many images: then each process compiles anew all that it imports

stage() { printf '\n== %s\n' "$*"; }

stage "the model and the data"
python launch/smollm2.py
python launch/quickstart_data.py --out "$results"
if [[ -e $run ]]; then
    echo "removing $run of an earlier quickstart: otherwise dist-lora train would find it finished and train nothing"
    rm -r -- "$run"
fi

stage "before: dist-lora eval $config --nproc 2"
dist-lora eval "$config" --nproc 2 --json > "$results/before.json"

stage "training: dist-lora train $config --nproc 2"
dist-lora train "$config" --nproc 2

stage "after: dist-lora eval $config --adapter $run/adapter --nproc 2"
dist-lora eval "$config" --adapter "$run/adapter" --nproc 2 --json > "$results/after.json"

stage "results"
python launch/quickstart_table.py --before "$results/before.json" --after "$results/after.json" --run "$run"
