#!/usr/bin/env bash
# Llama 2 7B: calibrate if needed, then compress to 80 … 40 % in one run. Finished steps are skipped.
#   bash scripts/compress_llama2_7b.sh MODEL_DIR [DEVICE]
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"
calibrate_model llama2_7b "$1" "${2:-auto}"
compress_model llama2_7b "$1" "${2:-auto}"
