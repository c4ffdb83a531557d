#!/usr/bin/env bash
# Evaluate every model in MODELS_DIR that has one of the names in batch.sh, and its compressed versions.
#   bash scripts/evaluate_all.sh MODELS_DIR [DEVICE]
source "$(dirname "${BASH_SOURCE[0]}")/batch.sh"
each_model evaluate_model "$1" "${2:-auto}"
