#!/bin/sh
# The ablation: distil where the policy says not to. Takes the variables and arguments of train.sh.
#
#   seed=1029 dataset=cifar-100 net1=vgg13 net2=vgg8 distiller=at sh train_anti.sh [--resume | --overwrite] [key=value ...]
. "$(dirname -- "$0")/train.sh" # which sees by its name, $0, that it is this one
