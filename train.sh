#!/bin/sh
# Distil a student by spot-adaptive knowledge distillation. Trains the teacher first if it is missing.
#
#   seed=1029 dataset=cifar-100 net1=vgg13 net2=vgg8 distiller=at sh train.sh [--resume | --overwrite] [key=value ...]
#
# Those are the defaults; with dataset=digits the networks are resnet20 and resnet8, which take minutes on a CPU.
# Variables: seed, dataset, num_classes, net1 (teacher), net2 (student), distiller; teacher_args holds key=value words
# for the teacher's training; nproc is the number of processes that share each batch, one GPU each (default 1), for
# the teacher as well, and nnodes the number of machines (see docs/running.md). Many runs are usually
# faster as one per GPU (python -m utils.grid) than with nproc. Further arguments go to train.py (see --help there).
set -euf
CDPATH='' cd -- "$(dirname -- "$0")"

case $0 in *train_anti.sh) entry=train_anti.py ;; *) entry=train.py ;; esac # train_anti.sh is this file under its name

for word in ${teacher_args:-}; do
    set -- "$@" --teacher-arg "$word"
done

[ -z "${model:-}" ] || echo "model=$model changes nothing here; net1 is the teacher, and net2 the student"

requirements=requirements.txt
. utils/python.sh
exec "$python" -m utils.launch "${nnodes:+${nnodes}x}${nproc:-1}" "$entry" \
    ${seed:+--seed "$seed"} ${dataset:+--dataset "$dataset"} ${net1:+--net1 "$net1"} ${net2:+--net2 "$net2"} \
    ${distiller:+--distiller "$distiller"} ${num_classes:+"dataset.num_classes=$num_classes"} "$@"
