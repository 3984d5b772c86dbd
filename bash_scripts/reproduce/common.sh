# Sourced by the scripts of this folder: their options, and one cell of a table at a time.
#
# A cell is finished once its metrics.json is there and says no other; it is not run again. Runs that
# several tables share (--out) are trained once. What fails or is stopped ends the script: no network is
# evaluated before its last epoch. Each script ends with a report on everything below --out.

usage() {
    sed -n '2,/^[^#]/{/^#/!d;s/^# \{0,1\}//;p}' "$0"
    cat <<'TEXT'

Options:
  --data NAME=PATH  images of cifar10, cifar100, stl10 or imagenet100: a folder of train*.npz and
                    test.npz, or torchvision's root, or (imagenet100) a folder with train/ and val/;
                    repeatable (default: datasets, downloaded by torchvision where it can be)
  --datasets "..."  only these
  --budgets "..."   only these target budgets
  --epochs N        of pre-training (published: 500)
  --width N         of the network (published: 64)
  --fraction F      of the training images
  --linear "..."    overrides of linear evaluation, as "max_epochs=20 augment=false seeds=2"
  --gating "..."    keys of the gating group for gated methods, as "sparsity_weight=100"
  --out DIR         runs and report (default: trained_models/reproduce)
  --dry-run         print the commands and run nothing
  -- key=value ...  overrides of pre-training
TEXT
}

absolute() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac }
fail() { echo "error: $1" >&2; exit 2; }

declare -A data_path=()
only_datasets="" only_budgets="" out=trained_models/reproduce dry_run=false linear_overrides=() gating=()
scale=() fraction=() extra=()
while [ $# -gt 0 ]; do
    option=$1
    case $option in
    --data | --datasets | --budgets | --epochs | --width | --fraction | --linear | --gating | --out)
        [ $# -ge 2 ] || fail "$option: needs a value"
        value=$2
        shift
        ;;
    esac
    case $option in
    --data)
        [[ $value == *=* ]] || fail "--data: got '$value', expected NAME=PATH"
        [ -d "${value#*=}" ] || fail "--data: '${value#*=}' is not a folder"
        data_path[${value%%=*}]=$(absolute "${value#*=}")
        ;;
    --datasets) only_datasets=$value ;;
    --budgets) only_budgets=$value ;;
    --epochs) scale+=("max_epochs=$value") ;;
    --width) scale+=("backbone.kwargs.width=$value") ;;
    --fraction) fraction=("data.fraction=$value") ;;
    --linear) read -r -a linear_overrides <<<"$value" ;;
    --gating) read -r -a gating <<<"$value" ;;
    --out) out=$(absolute "$value") ;;
    --dry-run) dry_run=true ;;
    -h | --help) usage; exit ;;
    --) shift; extra=("$@"); break ;;
    *) fail "$option: no such option; --help lists them" ;;
    esac
    shift
done
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source bash_scripts/cells.sh
if $dry_run; then python=${PYTHON:-python}; else source bash_scripts/environment.sh; fi

# The published ones, or those that were asked for.
datasets() { echo "${only_datasets:-$1}"; }
budgets() { echo "${only_budgets:-$1}"; }

run() { # a command, printed or run
    if $dry_run; then printf '%q ' "$@"; echo; else "$@"; fi
}

images() { # data set -> overrides that name its images, one a line
    local path=${data_path[$1]:-datasets}
    if compgen -G "$path/train*.npz" >/dev/null; then
        printf '%s\n' data.format=npz "data.train_path='$path/train*.npz'" "data.val_path='$path/test.npz'"
    elif [ "$1" = imagenet100 ] && [ -n "${data_path[$1]:-}" ]; then
        printf '%s\n' "data.train_path='$path/train'" "data.val_path='$path/val'"
    elif [ "$1" != imagenet100 ]; then
        printf '%s\n' "data.train_path='$path'" "data.val_path='$path'"
    fi
}

pretrain() { # run's name, config, data set, overrides
    local name=$1 config=$2 dataset=$3
    shift 3
    if finished "$out/$name" >/dev/null; then echo "$name: done before"; return; fi
    echo "== $name: pre-training"
    mapfile -t where < <(images "$dataset")
    case "$*" in *gating.*) set -- "$@" ${gating[@]+"${gating[@]/#/gating.}"} ;; esac
    run "$python" -m solo_gating.main_pretrain --config-name "${config}_$dataset" name="$name" \
        checkpoint.dir="$out/$name" auto_resume.enabled=true "${where[@]}" "$@" \
        ${scale[@]+"${scale[@]}"} ${fraction[@]+"${fraction[@]}"} ${extra[@]+"${extra[@]}"}
    $dry_run || finished "$out/$name" >/dev/null || { unfinished "$out/$name"; exit 1; }
}

run_of() { # name -> folder of its finished run
    if finished "$out/$1"; then return; fi
    $dry_run || { unfinished "$out/$1"; return 1; }
    echo "$out/$1/METHOD/RUN"
}

evaluate() { # linear, knn, policy or one with a suffix, run's name, data set of evaluation, overrides
    local kind=$1 name=$2 dataset=$3 folder="$out/$2/$1-$3" of
    shift 3
    of=$(run_of "$name")/last.ckpt
    if evaluated "$folder/metrics.json" "$of"; then echo "$name, $kind on $dataset: done before"; return; fi
    echo "== $name: $kind on $dataset"
    mapfile -t where < <(images "$dataset")
    run "$python" -m "solo_gating.main_${kind%%_*}" dataset="$dataset" \
        checkpoint="$of" output="$folder" "${where[@]}" \
        ${fraction[@]+"${fraction[@]}"} "$@"
}

linear() { evaluate linear "$@" ${linear_overrides[@]+"${linear_overrides[@]}"}; }
knn() { evaluate knn "$@"; }
knn_normalized() { evaluate knn_normalized "$@" normalize=true; }
policy() { evaluate policy "$@"; } # its policy.json is then in OUT/NAME/policy-DATASET

against_vicreg_dual() { # config: 1-NN of its runs and of VICReg-Dual-Gating's (Tables 4 to 6)
    local dataset budget method
    for dataset in $(datasets "cifar100 stl10"); do
        for budget in $(budgets "0.1 0.3 0.5"); do
            for method in vicreg_dual "$1"; do
                pretrain "$method-$dataset-$budget" "$method" "$dataset" gating.target_budget="$budget"
                knn "$method-$dataset-$budget" "$dataset"
            done
        done
    done
    report
}

report() { run "$python" -m solo_gating.main_report "$out" --output "$out/report"; }
