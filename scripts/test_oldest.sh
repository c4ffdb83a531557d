#!/usr/bin/env bash
# The tests of tiny models with the oldest versions of the libraries that pyproject.toml allows, in a separate
# environment (.venv-oldest, 6 GB: old builds of torch come with CUDA's libraries). Arguments go to pytest:
# bash scripts/test_oldest.sh tests/test_experts.py
export HISVD_VENV="${HISVD_VENV:-.venv}-oldest"
REQUIREMENTS="$(mktemp)"
trap 'rm -f "$REQUIREMENTS"' EXIT
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

"${HISVD_PYTHON:-python3}" - >"$REQUIREMENTS" <<'END'
import re
from pathlib import Path

project = Path("pyproject.toml").read_text().partition("[project]")[2].partition("[project.scripts]")[0]
for name, lowest in re.findall(r'"([\w-]+)>=([\d.]+)', project):
    print(f"{name}=={lowest}")
END
install_environment -e '.[dev,benchmarks]'

"$PYTHON" -m pip list --disable-pip-version-check 2>/dev/null | grep -iE "^($(cut -d= -f1 "$REQUIREMENTS" | paste -sd'|')) "
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -m "not real" "$@"
