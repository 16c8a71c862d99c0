#!/bin/sh
# Train one network with cross-entropy, for example a teacher.
#
#   seed=1029 dataset=cifar-100 model=vgg13 sh train_single.sh [--resume | --overwrite] [key=value ...]
#
# Variables: seed, dataset, num_classes, model; nproc, the number of processes that share each batch, one GPU each
# (default 1); nnodes, the number of machines (see docs/running.md). Further arguments go to train_single.py (see --help there).
set -eu
cd "$(dirname "$0")"

: "${seed:=1029}" "${dataset:=cifar-100}"
case $dataset in digits) : "${model:=resnet20}" ;; esac # small enough for a CPU
: "${model:=vgg13}" "${nproc:=1}"

. utils/python.sh
exec "$python" -m utils.launch "${nnodes:+${nnodes}x}$nproc" train_single.py --dataset "$dataset" --seed "$seed" --model "$model" \
    ${num_classes:+"dataset.num_classes=$num_classes"} "$@"
