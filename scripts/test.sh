#!/usr/bin/env bash
# ruff, mypy, shellcheck, bandit and all tests, including those on the real SmolLM2. Arguments go to pytest:
# bash scripts/test.sh -m "not real"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
bash scripts/fetch_smollm2.sh
install_environment gguf==0.19.0 -e '.[dev,benchmarks]'

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
bash scripts/check_types.sh
"$VENV/bin/shellcheck" scripts/*.sh .ci/run
"$PYTHON" -m bandit -r hisvd component utils -q -s B101,B404,B603,B615 # SECURITY.md says why these are left out
if (($#)); then
    "$PYTHON" -m pytest -q "$@"
else # two processes with one core each; the files that take longest come first (tests/conftest.py)
    OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder
fi
