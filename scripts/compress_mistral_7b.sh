#!/usr/bin/env bash
# Mistral 7B: calibrate if needed, then compress to 80 … 40 % in one run. Finished steps are skipped.
#   bash scripts/compress_mistral_7b.sh MODEL_DIR [DEVICE]
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"
calibrate_model mistral_7b "$1" "${2:-auto}"
compress_model mistral_7b "$1" "${2:-auto}"
