# Sourced by the other scripts: what is finished and need not be run again.

finished() { # folder of a pre-training -> its run that has trained all epochs; fails if there is none
    local file
    for file in "$1"/*/*/metrics.json; do
        [ -e "$file" ] && [ -e "${file%/*}/last.ckpt" ] || continue
        # A limit of the Trainer (max_steps, max_time) may have stopped it: then the run says so.
        grep -q '"finished": false' "$file" || { echo "${file%/*}"; return; }
    done
    return 1
}

evaluated() { # an evaluation's file, checkpoint: whether the one is of the other as it is now
    [ -e "$1" ] && ! [ "$2" -nt "$1" ]
}

unfinished() { # folder of a pre-training: one sentence
    echo "error: $1 holds no run that has trained all its epochs, so that none is evaluated" >&2
}
