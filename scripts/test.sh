#!/usr/bin/env bash
# ruff, mypy, shellcheck and all tests, including those on the real SmolLM2. Arguments go to pytest:
# bash scripts/test.sh -m "not real"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
bash scripts/fetch_smollm2.sh
install_environment gguf==0.19.0 -e '.[dev,benchmarks]'

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
bash scripts/check_types.sh
"$VENV/bin/shellcheck" scripts/*.sh .ci/run
if (($#)); then
    "$PYTHON" -m pytest -q "$@"
else # the tests of tiny models run in two processes, with one core each
    OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -m "not real" -n 2 --dist loadfile --no-loadscope-reorder
    "$PYTHON" -m pytest -q -m real
fi
