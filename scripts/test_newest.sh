#!/usr/bin/env bash
# Runs the fast tests, those of the seams to SAELens and torch first, with the newest releases of
# all dependencies: constraints.txt and the upper bound on sae-lens do not count. Everything is
# installed into a temporary folder, which is removed at the end.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

# a copy without the bound, which only says what to install
cp -r sae_lens_alloc sae_lens_alloc_cli pyproject.toml README.md LICENSE "$folder"
sed -i.bound -E 's/("sae-lens>=[0-9.]+),<[0-9.]+"/\1"/' "$folder/pyproject.toml"
"${PYTHON:-python3}" -m venv "$folder/venv"
python="$folder/venv/bin/python"
# torch's own index has builds for the CPU, which are smaller than those of PyPI
"$python" -m pip install --quiet --upgrade pip
"$python" -m pip install --quiet --upgrade \
    --extra-index-url "${TORCH_INDEX:-https://download.pytorch.org/whl/cpu}" "${folder}[test]"
"$python" -m pip list | grep -iE '^(sae-lens|transformer-lens|torch|transformers|datasets) '

"$python" -m pytest -p no:cacheprovider -q -n "${WORKERS:-2}" --dist worksteal tests/test_compat.py
"$python" -m pytest -p no:cacheprovider -q -n "${WORKERS:-2}" --dist worksteal -m "not slow"
