#!/usr/bin/env bash
# From nothing to two tables: environment, SmolLM2-135M, calibration, compression to 80 and 60 % of the linear parameters
# and to 40 % of their bytes, evaluation.
# A second run reuses whatever exists. Leaves out compress.py's update, which would double the time.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
bash scripts/fetch_smollm2.sh

MODEL=models/smollm2-135m
CACHE=calibration_cache/smollm2-135m_n32_s512_with_hessian
"$PYTHON" calibrate.py --model_path "$MODEL" --model_name smollm2-135m --nsamples 32 --grad_nsamples 16 \
  --seqlen 512 --dataset python-docs

OUT=compressed_models/smollm2-135m
compress() { # arguments: output, target and options
  "$PYTHON" compress.py --model_path "$MODEL" --calib_cache "$CACHE" --save_model "$1" --update none "${@:2}"
}
if [ ! -e "${OUT}_80p" ] && [ ! -e "${OUT}_60p" ]; then
  compress "$OUT" --target_compression 0.8,0.6 # both from one decomposition of each matrix
else
  [ -e "${OUT}_80p" ] || compress "${OUT}_80p" --target_compression 0.8
  [ -e "${OUT}_60p" ] || compress "${OUT}_60p" --target_compression 0.6
fi
[ -e "${OUT}_40b" ] || compress "${OUT}_40b" --target_bytes 0.4

evaluate() { # arguments: JSON file, models and options
  "$PYTHON" evaluate.py --datasets python-docs --seqlen 512 --nsamples 8 --speed --json "$1" --model_path "$MODEL" "${@:2}"
}
evaluate results/quickstart.json --model_path "${OUT}_80p" --model_path "${OUT}_60p"
DTYPE=bfloat16 # in which codes are quick on CPUs
if [ "$(uname -m)" = x86_64 ] && ! grep -qs avx512 /proc/cpuinfo; then
  DTYPE=float32 # products in bfloat16 would take five times as long
fi
evaluate results/quickstart_bytes.json --model_path "${OUT}_40b" --dtype "$DTYPE"
