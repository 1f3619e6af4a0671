#!/usr/bin/env bash
# A TPU pod, from your own machine: the same command line on every host.
#
#   TPU=name ZONE=zone scripts/tpu.sh setup                          # code and environment on every host
#   TPU=name ZONE=zone CKPT=single_domain_01 scripts/tpu.sh train    # train, evaluate, bring the run folder here
#   TPU=name ZONE=zone CKPT=single_domain_01 scripts/tpu.sh fetch    # bring the run folder here at any time
#
# CKPT is the name of a file in configs/, MODE probe or the name of one to lay over it. DRY=1 only prints the commands.
# `train` goes on where an earlier one stopped: it copies the run folder to every host first.
set -euo pipefail
cd "$(dirname "$0")/.."

TPU=${TPU:-TPU-NAME} ZONE=${ZONE:-ZONE} CKPT=${CKPT:-demo} MODE=${MODE:-probe} DRY=${DRY:-}
read -ra gcloud <<< "${GCLOUD:-gcloud compute tpus tpu-vm}"

run=runs/cls_$CKPT
settings="--config configs/$CKPT.yaml"
name=
if [ "$MODE" != probe ]; then
    run+=_$MODE
    settings+=" --config configs/$MODE.yaml"
    name=" log.run_name=${CKPT}_$MODE"
fi
python="PJRT_DEVICE=TPU .venv-xla/bin/python"

show_and_run() {
    echo "$*"
    [ -n "$DRY" ] || "$@"
}

copy() { # to or from hosts; the last argument says which: all, or the number of one
    show_and_run "${gcloud[@]}" scp "${@:1:$#-1}" --zone="$ZONE" --worker="${*: -1}"
}

on_all() { # a command line, on every host
    echo "${gcloud[*]} ssh $TPU --zone=$ZONE --worker=all --command=\"$1\""
    [ -n "$DRY" ] || "${gcloud[@]}" ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

send_run() { copy --recurse "$run" "$TPU:octprobe/runs" all; }
fetch_run() { copy --recurse "$TPU:octprobe/$run" runs 0; }

case ${1:-} in
setup)
    show_and_run git archive --format=tar.gz --output=octprobe.tar.gz HEAD
    copy octprobe.tar.gz .env "$TPU:" all
    on_all "sudo apt-get update && sudo apt-get install -y make python3.11 python3.11-venv"
    on_all "mkdir -p octprobe/runs && tar xzf octprobe.tar.gz -C octprobe && mv .env octprobe && cd octprobe && make setup-xla"
    ;;
train)
    if [ -e "$run" ]; then send_run; fi
    on_all "cd octprobe && $python train.py $settings device.backend=xla paths.run_dir=$run$name train.resume=auto"
    fetch_run
    send_run # every host reads the checkpoint
    on_all "cd octprobe && $python eval.py --ckpt $run --split val && $python eval.py --ckpt $run --split test"
    fetch_run
    ;;
fetch) fetch_run ;;
*)
    echo "usage: TPU=name ZONE=zone [CKPT=name] [MODE=name] [DRY=1] $0 setup | train | fetch" >&2
    exit 2
    ;;
esac
