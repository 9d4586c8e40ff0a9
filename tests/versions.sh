#!/usr/bin/env bash
# Do the lower bounds in requirements.txt hold? Runs the suite once with the oldest versions that it
# admits and once with the newest, each in a fresh environment that is removed afterwards.
#     bash tests/versions.sh [oldest|newest]                 # one of the two; both without a word
#     TORCH=torch==2.13.0 bash tests/versions.sh newest      # this torch, for example a CPU build
# On two cores newest takes 5 minutes (a CPU build), oldest 7 to 11 (CUDA libraries of several GB).
set -euo pipefail
cd "$(dirname "$0")/.."
ages=${1:-oldest newest}
[[ " oldest newest " == *" $ages "* ]] || { echo "usage: $0 [oldest|newest]" >&2; exit 2; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
sed 's/>=/==/' requirements.txt > "$folder/oldest.txt"       # "at least" becomes "exactly"
names=$(sed 's/[>=].*//' requirements.txt | paste -sd '|')   # torch|transformers|...
failed=0
for age in $ages; do
    python -m venv "$folder/venv"
    pip=("$folder/venv/bin/python" -m pip)
    if [[ $age == oldest ]]; then
        "${pip[@]}" install -qq -r "$folder/oldest.txt"
    else  # TORCH stands beside the file: installed before it, --upgrade would replace it
        "${pip[@]}" install -qq --upgrade -r requirements.txt ${TORCH:-}
    fi
    echo "$age:" $("${pip[@]}" freeze | grep -iE "^($names|numpy)==")
    "$folder/venv/bin/python" -m pytest -q tests > "$folder/log" 2>&1 || failed=1
    grep -E '^(FAILED|ERROR)' "$folder/log" || true          # nothing, if all passed
    tail -n 1 "$folder/log"
    rm -rf "$folder/venv"
done
exit $failed
