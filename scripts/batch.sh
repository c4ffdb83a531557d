# shellcheck shell=bash
# What the batch scripts share: paths, and how a step is logged. Sourced, not run.
# For a model NAME, the cache goes to calibration_cache/, compressed models to compressed_models/NAME_80p …, figures to
# results/NAME.json, and each step's output to logs/STEP_NAME.log. Environment variables change the sizes.
set -euo pipefail

if [ -z "${1:-}" ]; then
  echo "Error: no folder given; usage: $(sed -n 's/^#   //p' "$0")" >&2
  exit 2
fi

PYTHON="${PYTHON:-python}"
HERE="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
NSAMPLES="${NSAMPLES:-256}"          # calibration sequences
GRAD_NSAMPLES="${GRAD_NSAMPLES:-64}" # of which this many also give gradients
SEQLEN="${SEQLEN:-2048}"
DATASET="${DATASET:-wikitext2}"      # to calibrate on
DATASETS="${DATASETS:-wikitext2,c4}" # to evaluate on
TARGETS="${TARGETS:-0.8 0.7 0.6 0.5 0.4}"
REFINE="${REFINE:-none}" # weights: then trained towards the original's predictions, which takes longer still
UPDATE="${UPDATE:-none}" # none: one decomposition serves all targets; sequential: better and slower
NAMES=(llama7b llama2_7b llama3_8b llama13b llama_30b mistral_7b opt6.7b)

cache_of() { # argument: NAME
  echo "calibration_cache/$1_n${NSAMPLES}_s${SEQLEN}_with_hessian"
}

output_of() { # arguments: NAME, target
  echo "compressed_models/$1_$(awk -v t="$2" 'BEGIN { print 100 * t }')p"
}

step() { # arguments: step, NAME, program, options; shows the program's output and logs it
  mkdir -p logs results compressed_models
  echo "$1 $2: logs/$1_$2.log"
  "$PYTHON" "$HERE/$3" "${@:4}" 2>&1 | tee -a "logs/$1_$2.log"
}

calibrate_model() { # arguments: NAME, MODEL_DIR, DEVICE; a finished cache is left as it is
  step calibrate "$1" calibrate.py --model_path "$2" --model_name "$1" --device "$3" \
    --nsamples "$NSAMPLES" --grad_nsamples "$GRAD_NSAMPLES" --seqlen "$SEQLEN" --dataset "$DATASET"
}

compress_model() { # arguments: NAME, MODEL_DIR, DEVICE; targets whose output exists are skipped
  local target output="compressed_models/$1" missing=()
  for target in $TARGETS; do
    [ -e "$(output_of "$1" "$target")" ] || missing+=("$target")
  done
  if [ ${#missing[@]} -eq 0 ]; then
    echo "compress $1: all targets exist"
    return
  fi
  [ ${#missing[@]} -gt 1 ] || output="$(output_of "$1" "${missing[0]}")" # for a single target compress.py adds no ratio to the name
  step compress "$1" compress.py --model_path "$2" --calib_cache "$(cache_of "$1")" --device "$3" \
    --target_compression "$(IFS=,; echo "${missing[*]}")" --update "$UPDATE" --refine "$REFINE" \
    --save_model "$output" --json "results/compress_$1.json"
}

evaluate_model() { # arguments: NAME, MODEL_DIR, DEVICE; skipped if the results are newer than all models
  local target stale="" models=(--model_path "$2")
  for target in $TARGETS; do
    models+=(--model_path "$(output_of "$1" "$target")")
    [ "results/$1.json" -nt "$(output_of "$1" "$target")" ] || stale=yes
  done
  if [ -z "$stale" ]; then
    echo "evaluate $1: results/$1.json is up to date"
    return
  fi
  step evaluate "$1" evaluate.py "${models[@]}" --datasets "$DATASETS" --seqlen "$SEQLEN" --device "$3" \
    --speed --json "results/$1.partial.json"
  mv "results/$1.partial.json" "results/$1.json"
}

each_model() { # arguments: a function above, MODELS_DIR, DEVICE; calls it for every NAME with a folder of that name
  local name found=""
  for name in "${NAMES[@]}"; do
    if [ -d "$2/$name" ]; then
      found=yes
      "$1" "$name" "$2/$name" "$3"
    fi
  done
  if [ -z "$found" ]; then
    echo "Error: $2 has none of the folders ${NAMES[*]}." >&2
    exit 2
  fi
}
