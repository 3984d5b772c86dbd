# Sourced by the studies, from the project's root: their common setting, and how a run is made once.
#
# From the environment: OUT, SEEDS ("0 1 2"), SHARES ("0.1 0.3 0.5 0.8"), WIDTH (16), EPOCHS (digits 60,
# CIFAR 20), PIXELS (CIFAR: the images are made smaller first; 16), JOBS (1) runs at once.
#
# What a study says: `overrides`, for each variant's name; and `arguments VARIANT SEED`, which sets `run` to
# the arguments of its training, without those that are set here, and may change `length` (epochs),
# `run_width` and `projector`.

source bash_scripts/environment.sh
source bash_scripts/cells.sh
read -r -a seeds <<<"${SEEDS:-0 1 2}"
read -r -a shares <<<"${SHARES:-0.1 0.3 0.5 0.8}"
width=${WIDTH:-16} pixels=${PIXELS:-16}

prepare() { # "digits", or "cifar10" or "cifar100", for which DATA is a folder -> data, epochs, common, projector
    data=$1
    projector=()
    common=(precision=32-true final_knn.enabled=true knn_eval.enabled=false enable_progress_bar=false)
    case $data in
    digits)
        epochs=${EPOCHS:-60}
        [ -e datasets/digits/train.npz ] || "$python" -m solo_gating.data.digits datasets/digits
        ;;
    cifar10 | cifar100)
        epochs=${EPOCHS:-20}
        [ -d "${DATA:-}" ] || { echo "error: DATA: '${DATA:-}' is not a folder of train*.npz and test.npz" >&2; exit 2; }
        local view images=datasets/study_${data}_$pixels
        view="{crop_size:$pixels,num_crops:1,rrc:{enabled:true,crop_min_scale:0.2,crop_max_scale:1.0},\
color_jitter:{prob:0.8,brightness:0.4,contrast:0.4,saturation:0.2,hue:0.1},grayscale:{prob:0.2},\
gaussian_blur:{prob:0.0},solarization:{prob:0.1},equalization:{prob:0.0},horizontal_flip:{prob:0.5}}"
        [ -e "$images/test.npz" ] || "$python" research/study.py shrink "$DATA" "$images" "$pixels"
        views="augmentations=[$view,$view]"
        one_view="augmentations=[$view]"
        common+=(optimization=adamw data.format=npz "data.train_path='$images/train*.npz'"
            "data.val_path='$images/test.npz'" data.pipeline=device "$views"
            optimizer.batch_size=64 optimizer.lr=6e-3 scheduler.warmup_epochs=$((epochs / 10)))
        projector=(method_kwargs.proj_hidden_dim=512 method_kwargs.proj_output_dim=512)
        ;;
    esac
    out=${OUT:-trained_models/${study}_$data}
}

narrow() { # share of the FLOPs -> the width of a dense network that has them
    "$python" -c "print(round($width * $1 ** 0.5))"
}

made() { # variant, seed, further arguments: trained and evaluated, unless it is
    local variant=$1 seed=$2 folder="$out/$1/seed_$2" length=$epochs run_width=$width run=() checkpoint
    local projector=("${projector[@]}"); shift 2
    arguments "$variant" "$seed" || return # `set -e` is off where a failure is waited for
    finished "$folder" >/dev/null ||
        "$python" research/ablations.py --config-name "${run[0]}" name="$variant" seed="$seed" checkpoint.dir="$folder" \
            auto_resume.enabled=true "${common[@]}" "${projector[@]}" max_epochs="$length" check_val_every_n_epoch="$length" \
            "${run[@]:1}" backbone.kwargs.width="$run_width" "$@" || return
    checkpoint=$(finished "$folder")/last.ckpt || { unfinished "$folder"; return 1; }
    evaluated "$folder/accuracies.json" "$checkpoint" ||
        "$python" research/study.py evaluate "$checkpoint" "$folder/accuracies.json" "${shares[@]}"
}

make_all() { # further arguments: all variants with all seeds, and their table
    local variant seed folder run
    for variant in "${variants[@]}"; do
        [ -n "${overrides[$variant]+known}" ] ||
            { echo "error: VARIANTS: got $variant, expected one of ${!overrides[*]}" >&2; exit 2; }
    done
    mkdir -p "$out"
    for seed in "${seeds[@]}"; do
        for variant in "${variants[@]}"; do
            made "$variant" "$seed" "$@" >"$out/$variant-$seed.log" 2>&1 ||
                echo "failed, see $out/$variant-$seed.log" >&2 &
            while [ "$(jobs -rp | wc -l)" -ge "${JOBS:-1}" ]; do wait -n; done
        done
    done
    wait
    "$python" research/study.py table "$out" "${shares[@]}" | tee "$out/table.md"
    for seed in "${seeds[@]}"; do
        for variant in "${variants[@]}"; do
            folder="$out/$variant/seed_$seed"
            run=$(finished "$folder") && evaluated "$folder/accuracies.json" "$run/last.ckpt" ||
                { echo "error: $folder is not finished; the same command continues" >&2; exit 1; }
        done
    done
}
