#!/usr/bin/env bash
# Every row of "From file to file" in docs/performance.md: models, images and measurements. About 100 minutes on two
# cores that do nothing else. What is in WORK is not made again. In the end all rows go into docs/performance: of one
# machine and version.
#
#     benchmarks/prediction_rows.sh WORK        # folder of models and images
#
# BTCV_IMAGES and BTCV_MODEL, if set: a folder of scans of BTCV, and an NMSW model of 14 classes that was trained on them.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$1/rows"
cd "$1"
export nnUNet_raw=$PWD/raw nnUNet_preprocessed=$PWD/preprocessed nnUNet_results=$PWD/results nnUNet_compile=f
export nnUNet_n_proc_DA=1 OMP_WAIT_POLICY=PASSIVE
organs=raw/Dataset940_Organs3/imagesTs

# A model of three classes that finds 29 organs. MODEL PLANS PATCH TRAINED_PATCH FEATURES...
train() {
    local model=$1 plans=$2 patch=$3 trained=$4
    shift 4
    [ -d "$model" ] && return
    python -m nnunet_nmsw.demo.small_plans -d 940 --patch_size "$trained" "$trained" "$trained" --features "$@" --name "$plans"
    nnUNetv2_train 940 3d_fullres 0 -p "$plans" -tr nnUNetTrainerNMSW_1epoch -device cpu
    with_patch "results/Dataset940_Organs3/nnUNetTrainerNMSW_1epoch__${plans}__3d_fullres" "$patch" "$model"
}
# A copy of a model with larger patches. MODEL PATCH COPY
with_patch() {
    [ -d "$3" ] && return
    cp -rL "$1" "$3"
    python - "$3/plans.json" "$2" <<'P'
import json, sys
file, patch = sys.argv[1], int(sys.argv[2])
plans = json.load(open(file))
plans["configurations"]["3d_fullres"]["patch_size"] = [patch] * 3
json.dump(plans, open(file, "w"), indent=1)
P
}
# A copy of a model with more classes or features. MODEL COPY FLAGS...
widened() { [ -d "$2" ] || python "$here/synthetic.py" --widen "$1" -o "$2" "${@:3}"; }
# One JSON file. NAME MODEL IMAGES FLAGS...
row() {
    local file=rows/prediction_$1.json
    [ -f "$file" ] && return
    # What OpenVINO converts is kept: not measured.
    for precision in float32 bfloat16; do
        rm -rf warm one && mkdir one && ln -s "$(find -L "$(realpath "$3")" -name "*_0000*" | sort | head -1)" one/
        nmsw_predict -m "$2" -f 0 -i one -o warm -device cpu --disable_tta -k 1 --backend openvino --precision $precision
    done
    echo "$1"
    python "$here/prediction.py" -m "$2" -i "$3" -device cpu -rounds 1 -o "$file" "${@:4}"
}

if [ ! -d preprocessed/Dataset940_Organs3 ]; then
    python "$here/synthetic.py" -d 940 -classes 3 -organs 29
    nnUNetv2_plan_and_preprocess -d 940 -c 3d_fullres -np 2 -npfp 2
fi
[ -d raw/Dataset935_Organs30 ] || python "$here/synthetic.py" -d 935 -classes 30 -image 128 160 160 -cases 10
train SMALL nnUNetPlans_32 64 32 8 16 32 64
widened SMALL SMALL_30 -classes 30
widened SMALL SMALL_118 -classes 118
train NARROW nnUNetPlans_64 96 64 8 16 32 64 80 80
widened NARROW FULL --times 4
[ -f FULL/fold_0/local_branch_int8.json ] || nmsw_quantize -m FULL -d 940 -cases 2
with_patch FULL 128 FULL_128
widened FULL_128 FULL_128_30 -classes 30

row full_width FULL $organs --disable_tta --int8
row full_width_128 FULL_128 $organs --disable_tta --int8 -rounds 2
row full_width_128_mirrored FULL_128 $organs --magnify 0.7
if [ -n "${BTCV_IMAGES:-}" ]; then
    row full_width_128_ct FULL_128_30 "$BTCV_IMAGES" --disable_tta
fi
if [ -n "${BTCV_MODEL:-}" ]; then
    row ten_ct "$BTCV_MODEL" "$BTCV_IMAGES" --disable_tta -cases 10
    row ct_mirrored "$BTCV_MODEL" "$BTCV_IMAGES"
fi
row large_3 SMALL $organs --disable_tta
row large_30 SMALL_30 $organs --disable_tta
row medium_118 SMALL_118 $organs --disable_tta --magnify 0.5
row ten_small_30 SMALL_30 raw/Dataset935_Organs30/imagesTs --disable_tta -cases 10
cp rows/*.json "$here/../docs/performance/"
