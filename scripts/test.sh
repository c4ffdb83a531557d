#!/usr/bin/env bash
# ruff, shellcheck and all tests, those on the real SmolLM2 included. Arguments go to pytest: bash scripts/test.sh -m "not real"
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
bash scripts/fetch_smollm2.sh
install_environment gguf==0.19.0 -e '.[dev,benchmarks]'

"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$VENV/bin/shellcheck" scripts/*.sh .ci/run
"$PYTHON" -m pytest -q "$@"
