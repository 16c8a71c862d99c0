#!/bin/sh
# Distil a student by spot-adaptive knowledge distillation. Trains the teacher first if it is missing.
#
#   seed=1029 dataset=cifar-100 net1=vgg13 net2=vgg8 distiller=at sh train.sh [--resume | --overwrite] [key=value ...]
#
# Those are the defaults; with dataset=digits the networks are resnet20 and resnet8, which take minutes on a CPU.
# Variables: seed, dataset, num_classes, net1 (teacher), net2 (student), distiller; teacher_args holds further
# arguments for the teacher's training; nproc is the number of processes that share each batch, one GPU each
# (default 1), for the teacher as well. Further arguments go to train.py (see --help there).
set -eu
cd "$(dirname "$0")"

: "${seed:=1029}" "${dataset:=cifar-100}"
case $dataset in digits) : "${net1:=resnet20}" "${net2:=resnet8}" ;; esac
: "${net1:=vgg13}" "${net2:=vgg8}" "${distiller:=at}" "${nproc:=1}"
: "${entry:=train.py}" # train_anti.sh sets this

. utils/python.sh
set -- --dataset "$dataset" --seed "$seed" --net1 "$net1" --net2 "$net2" --distiller "$distiller" \
    ${num_classes:+"dataset.num_classes=$num_classes"} "$@"

status=0
"$python" "$entry" --check-teacher "$@" || status=$?
case $status in
    0) ;;
    3 | 4)
        # The teacher sees the same data and writes below the same folder.
        shared=$(for argument in "$@"; do
            case $argument in dataset.*=* | run.*=* | training.device=* | training.precision=*) printf '%s\n' "$argument" ;; esac
        done)
        case $status in
            3) resume='' && echo "teacher $net1 is missing: training it first (train_single.sh)" ;;
            4) resume=--resume && echo "teacher $net1 is unfinished: going on with it (train_single.sh --resume)" ;;
        esac
        (
            IFS='
'
            # shellcheck disable=SC2086  # one argument per line of $shared; teacher_args is split at blanks
            set -- $resume $shared
            IFS=' '
            # shellcheck disable=SC2086
            nproc=$nproc model=$net1 dataset=$dataset seed=$seed sh train_single.sh "$@" ${teacher_args:-}
        )
        ;;
    *) exit "$status" ;;
esac

exec "$python" -m utils.launch "$nproc" "$entry" "$@"
