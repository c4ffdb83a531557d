#!/usr/bin/env bash
# From nothing to a table: environment, SmolLM2-135M, calibration, compression to 0.8 and 0.6, INT6 export, evaluation.
# A second run reuses whatever exists. Leaves out compress.py's update, which would double the time.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
bash scripts/fetch_smollm2.sh

MODEL=models/smollm2-135m
CACHE=calibration_cache/smollm2-135m_n32_s512_with_hessian
"$PYTHON" calibrate.py --model_path "$MODEL" --model_name smollm2-135m --nsamples 32 --grad_nsamples 16 \
  --seqlen 512 --dataset python-docs

OUT=compressed_models/smollm2-135m
compress() { # arguments: targets, output, options
  "$PYTHON" compress.py --model_path "$MODEL" --calib_cache "$CACHE" --target_compression "$1" --save_model "$2" \
    --update none "${@:3}"
}
if [ ! -e "${OUT}_80p" ] && [ ! -e "${OUT}_60p" ]; then
  compress 0.8,0.6 "$OUT" # both from one decomposition of each matrix
else
  [ -e "${OUT}_80p" ] || compress 0.8 "${OUT}_80p"
  [ -e "${OUT}_60p" ] || compress 0.6 "${OUT}_60p"
fi
[ -e "${OUT}_int6" ] || compress 1 "${OUT}_int6" --export int6 # as many linears as raise the perplexity by 2.5 %

"$PYTHON" evaluate.py --model_path "$MODEL" --model_path "${OUT}_80p" --model_path "${OUT}_60p" \
  --model_path "${OUT}_int6" --datasets python-docs --seqlen 512 --nsamples 8 \
  --speed --json results/quickstart.json
