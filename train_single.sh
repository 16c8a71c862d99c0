#!/bin/sh
# Train one network with cross-entropy, for example a teacher.
#
#   seed=1029 dataset=cifar-100 model=vgg13 sh train_single.sh [--resume | --overwrite] [key=value ...]
#
# Those are the defaults; with dataset=digits the model is resnet20, which takes minutes on a CPU.
# Variables: seed, dataset, num_classes, model; nproc, the number of processes that share each batch, one GPU each
# (default 1); nnodes, the number of machines (see docs/running.md). Further arguments go to train_single.py (see --help there).
set -euf
CDPATH='' cd -- "$(dirname -- "$0")"

[ -z "${net1:-}${net2:-}${distiller:-}" ] || echo "net1, net2 and distiller change nothing here; model is ${model:-the default}"

requirements=requirements.txt
. utils/python.sh
exec "$python" -m utils.launch "${nnodes:+${nnodes}x}${nproc:-1}" train_single.py \
    ${seed:+--seed "$seed"} ${dataset:+--dataset "$dataset"} ${model:+--model "$model"} \
    ${num_classes:+"dataset.num_classes=$num_classes"} "$@"
