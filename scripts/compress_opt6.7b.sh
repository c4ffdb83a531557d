#!/usr/bin/env bash
# OPT 6.7B: calibrate if needed, then compress to 80 … 40 % in one run. Finished steps are skipped.
#   bash scripts/compress_opt6.7b.sh MODEL_DIR [DEVICE]
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"
calibrate_model opt6.7b "$1" "${2:-auto}"
compress_model opt6.7b "$1" "${2:-auto}"
