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

for argument in "$@"; do
    case $argument in -h | --help) exec "$python" "$entry" --help ;; esac
done

# Says on the first three lines which teacher is wanted (model, data set, seed), on the others what else its run
# has in common with the student's.
status=0
teacher=$("$python" "$entry" --check-teacher "$@") || status=$?
case $status in
    0) ;;
    3 | 4) (
        IFS='
'
        set -f
        # shellcheck disable=SC2086  # one argument per line
        set -- $teacher
        model=$1 dataset=$2 seed=$3
        shift 3
        if [ "$status" = 3 ]; then
            echo "teacher $model is missing: training it first (train_single.sh)"
        else
            echo "teacher $model is unfinished: going on with it (train_single.sh --resume)"
            set -- --resume "$@"
        fi
        unset IFS
        # shellcheck disable=SC2086  # teacher_args is split at blanks
        nproc=$nproc model=$model dataset=$dataset seed=$seed sh train_single.sh "$@" ${teacher_args:-}
    ) ;;
    *) exit "$status" ;;
esac

exec "$python" -m utils.launch "$nproc" "$entry" "$@"
