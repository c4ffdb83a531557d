#!/usr/bin/env bash
# Calibrate every model in MODELS_DIR that has one of the names in batch.sh.
#   bash scripts/calibrate_all.sh MODELS_DIR [DEVICE]
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"
each_model calibrate_model "$1" "${2:-auto}"
