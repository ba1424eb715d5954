#!/usr/bin/env bash
# SAELens' own tests with this package's classes in place of SAELens' (docs/host-tests.md).
#
#     scripts/host_tests.sh PATH_OF_A_SAELENS_CHECKOUT [RESULTS.json]
#
# PYTHON says which interpreter, GROUPS_TO_RUN which of the groups, WORK a folder that keeps the logs.
# The checkout is not changed.
set -euo pipefail

checkout=$(realpath "${1:?"usage: scripts/host_tests.sh PATH_OF_A_SAELENS_CHECKOUT [RESULTS.json]"}")
results=$(realpath -m "${2:-/dev/null}")
here=$(cd "$(dirname "${BASH_SOURCE[0]}")/host_tests" && pwd)
if [[ -n "${WORK:-}" ]]; then
  work=$(realpath -m "$WORK")
  mkdir "$work"
else
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
fi
cp -r "$checkout/tests" "$work/tests"
cd "$work"
export PYTHONPATH="$here/../..:$here${PYTHONPATH:+:$PYTHONPATH}"
export HF_HUB_OFFLINE=1 WANDB_MODE=disabled
mapfile -t files < <("${PYTHON:-python}" "$here/compare.py" --files)
for group in ${GROUPS_TO_RUN:-stock mutual_choice feature_choice aux_zipf runner}; do
  HOST_TESTS_GROUP=$group HOST_TESTS_RESULTS="$work/$group.json" timeout 3600 \
    "${PYTHON:-python}" -m pytest -p plugin -p no:cacheprovider -q --tb=short \
    --continue-on-collection-errors "${files[@]}" > "$group.log" 2>&1 || true
  [[ -f "$group.json" ]] || { tail -30 "$group.log"; exit 1; }
done
"${PYTHON:-python}" "$here/compare.py" "$work" "$results" "$checkout"
