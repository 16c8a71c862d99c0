#!/bin/bash
# The first minutes on a real GPU, at most 8: bash tests/first_gpu.sh, in the root of the repository. It needs no
# network, no linter and no launcher, and prints a table to paste. It stops itself in time; the first parts matter most.
#
# LIMIT=seconds in all (470); OUT=folder for the outputs; IMAGES=folder of images, <split>/<class>/*.jpg (else digits);
# PY=python. SMALL=1 tries all parts on the stand-in of tests/fakecuda, whose numbers mean nothing.
set -u
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 TQDM_DISABLE=1 CUBLAS_WORKSPACE_CONFIG=:4096:8
export OUT=${OUT:-${TMPDIR:-/tmp}/first_gpu} PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
LIMIT=${LIMIT:-470} PY=${PY:-python3} work=$OUT/work SECONDS=0
mkdir -p "$work" && rm -rf "$work/run"

if [ -n "${SMALL:-}" ]; then
  PY=$PY sh tests/fakecuda/build.sh "$work/fakecuda" || exit 1
  export LD_LIBRARY_PATH=$work/fakecuda LD_PRELOAD=$work/fakecuda/libfakecuda.so OMP_NUM_THREADS=1
  PRE=tests/fakecuda/run.py PICK=--collect-only EPOCHS=2 DROPS=1
fi

left() { echo $((LIMIT - SECONDS)); }
part() { echo; echo "## [$SECONDS s] $*"; }
lim() { # lim SECONDS COMMAND ...: run it for at most so long, and not beyond the end
  local most=$1 rest code
  shift
  rest=$(left)
  [ "$rest" -gt 5 ] || { echo "SKIPPED, no time left"; return; }
  timeout ${STOP:+-s "$STOP"} -k 5 $((most < rest ? most : rest)) "$@"
  code=$?
  [ $code != 124 ] || echo "CUT OFF after its time"
  return $code
}

part "machine"
nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm --format=csv,noheader 2>/dev/null
$PY - <<'P' || exit 1
import importlib.metadata as metadata
import re
import sys

import torch

print(sys.version.split()[0], "torch", torch.__version__, "cudnn", torch.backends.cudnn.version())
print(torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0))
missing = []
for name in re.findall(r"^[\w-]+", open("requirements.txt").read() + open("requirements-dev.txt").read(), re.MULTILINE):
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        missing.append(name)
print("missing packages:", *missing or ["none"])
import utils.config, utils.training.run
P

part "tests for a GPU: captured = eager = CPU on toys (limit 110 s)"
many=$($PY -c 'import xdist' 2>/dev/null && [ -z "${SMALL:-}" ] && echo "-n 4" || echo "-p no:xdist")
# shellcheck disable=SC2086
STOP=INT lim "${TESTS:-110}" $PY -m pytest -v -m gpu -o addopts= -p no:cacheprovider $many --durations=5 \
  tests/training/test_gpu.py ${PICK:-} > "$OUT/tests.txt" 2>&1
echo "passed $(grep -c PASSED "$OUT/tests.txt"), failed $(grep -cE "FAILED +\[|\] FAILED " "$OUT/tests.txt")"
grep -E "^(FAILED|ERROR|CUT|SKIPPED,)|[0-9] passed|no tests|tests collected" "$OUT/tests.txt" | cut -c1-200
grep -E "^E  " "$OUT/tests.txt" | head -20 | cut -c1-220

# Four steps. The order of sums alone moves the weights by 1e-3 to 5e-3 of their way in fp32 (measured on a CPU).
part "every distiller on vgg13 -> vgg8: captured? repetition = eager? GPU = CPU? (limit 100 s)"
cat > "$work/parity.py" <<'P'
import logging
import os
import sys
import time
from dataclasses import replace

import torch

from distillers import DISTILLERS
from utils.benchmark.cases import Case, Conditions, Kind, Pair
from utils.training.device import choose_device

told = []
logging.getLogger("sakd").handlers = [logging.Handler()]
logging.getLogger("sakd").propagate = False
logging.getLogger("sakd").handlers[0].emit = lambda record: told.append(record.getMessage())
logging.getLogger("sakd").setLevel(logging.INFO)
device, end = choose_device("cuda"), time.time() + float(sys.argv[1])
pair, small = Pair("vgg13", "vgg8"), bool(os.environ.get("SMALL"))
conditions = Conditions(device, batch_size=8 if small else 64, samples=2000 if small else 50_000)


def weights(case):
    return torch.cat([p.detach().double().cpu().flatten() for p in case.task.student.parameters()])


def distance(one, other, start):
    return f"{((one - other).norm() / (other - start).norm().clamp_min(1e-30)).item():.1e}"


def compare(name):
    """Weights after four steps: captured, eager, and for some eager once more, the yardstick."""
    words, ends = [f"{name:9s}"], []
    for graph in ("auto", "false") + ("false",) * (name in names[:3]):
        case = Case(pair, Kind(name, "adaptive"), replace(conditions, cuda_graph=graph))
        start = weights(case)
        torch.manual_seed(7)
        for _ in range(4):
            case.step()
        ends.append(weights(case))
        if graph == "auto":
            words.append(f"captured {case.captured}")
    words.append(f"captured-eager {distance(*ends[:2], start)}")
    if ends[2:]:
        words[-1] += f" (eager-eager {distance(*ends[1:], start)})"
    if name != "crd" and not small:  # another device draws other negatives
        ends, parts = [], []
        for where in (device, torch.device("cpu")):
            plain = replace(conditions, device=where, cuda_graph="false", channels_last="false")
            case = Case(pair, Kind(name, "fixed"), plain)
            start = weights(case)
            case.step()
            ends.append(weights(case))
            parts.append(case.eager.meter.means())
        worst = max((abs(parts[0][key] - value) / (abs(value) + 1e-6), key) for key, value in parts[1].items())
        words.append(f"GPU-CPU weights {distance(*ends, start)}, {worst[1]} {worst[0]:.1e}")
    return words


names = ["kd", "at", "crd", *sorted(set(DISTILLERS) - {"kd", "at", "crd"})]
for name in names[:3] if small else names:
    told.clear()
    if time.time() > end:
        print(name, "SKIPPED")
        continue
    try:
        words = compare(name)
    except Exception as error:
        words = [name, f"FAILED {type(error).__name__}: {str(error)[:160]}"]
    print(" | ".join([*words, *(line for line in told if "eager" in line)]))
    torch.cuda.empty_cache()
P
# shellcheck disable=SC2086
lim 100 $PY ${PRE:-} "$work/parity.py" 95 2>&1 | tee "$OUT/parity.txt" | tail -25

part "8 epochs on images, and the time of an epoch's parts (teacher, KD, AT, AT with larger evaluation batches)"
if [ -n "${IMAGES:-}" ]; then
  data="--dataset imagefolder dataset.root=$IMAGES dataset.img_h=32 dataset.img_w=32"
  data="$data training.num_workers=12 validation.num_workers=12"
  nets="resnet32x4 resnet8x4"
else
  data="--dataset digits" nets="resnet20 resnet8"
fi
# shellcheck disable=SC2086
set -- $nets
cat > "$work/epochs.py" <<'P'
import collections
import functools
import runpy
import statistics
import sys
import time

import torch

from utils.training.engine import Engine

spent = collections.defaultdict(list)


def watch(name):
    method = getattr(Engine, name)

    @functools.wraps(method)
    def watched(*words, **options):
        torch.cuda.synchronize()
        start = time.perf_counter()
        try:
            return method(*words, **options)
        finally:
            torch.cuda.synchronize()
            spent[name].append(time.perf_counter() - start)

    setattr(Engine, name, watched)


for name in ("_fit_epoch", "_evaluate", "save"):
    watch(name)
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ending:
    print("exit", ending.code)
for name, seconds in spent.items():
    rest = statistics.median(seconds[1:]) if seconds[1:] else 0
    print(f"  {name:13s} first {seconds[0]:.2f} s, median of the others {rest:.3f} s")
P
common="training.epochs=${EPOCHS:-8} training.lr_decay_epochs=[${DROPS:-5,7}]"
common="$common training.precision=bf16 run.root=$work/run"
# shellcheck disable=SC2086
lim 60 $PY ${PRE:-} "$work/epochs.py" train_single.py $data --model "$1" $common > "$OUT/teacher.txt" 2>&1
grep -E "eagerly|error|best val|exit|  _|  save" "$OUT/teacher.txt"
teacher=kd.teacher.checkpoint=$(ls -d "$work"/run/*/1029/"$1"/ckpt/best.pth 2>/dev/null)
for how in "--distiller kd kd.selection=fixed" "--distiller at" \
  "--distiller at validation.batch_size=1000 training.seed=1030 training.epochs=3 training.lr_decay_epochs=[2]"; do
  echo "$1 -> $2 $how"
  # shellcheck disable=SC2086
  lim 60 $PY ${PRE:-} "$work/epochs.py" train.py $data --net1 "$1" --net2 "$2" $common "$teacher" $how \
    > "$OUT/run.txt" 2>&1
  cat "$OUT/run.txt" >> "$OUT/runs.txt"
  grep -E "eagerly|rror|best val|exit|  _|  save" "$OUT/run.txt" | cut -c1-200
done

part "ms of a step, most important first; without a graph for what that is worth (the rest of the time)"
pairs=vgg13-vgg8,wrn_40_2-wrn_16_2,resnet32x4-resnet8x4,resnet110-resnet32,ResNet50-MobileNetV2
first=vgg13-vgg8,wrn_40_2-wrn_16_2 size="" kinds=at,crd,sp
[ -z "${SMALL:-}" ] || { pairs=vgg13-vgg8 first=$pairs size="--batch-size 8 --samples 2000 --rounds 1" kinds=at; }
for how in "$pairs bf16 auto" "$first bf16 false" "$pairs tf32 auto" "$pairs fp32 auto"; do
  # shellcheck disable=SC2086
  set -- $how
  echo "cuda_graph $3"
  # shellcheck disable=SC2086
  lim 300 $PY ${PRE:-} -m utils.benchmark "$1" $kinds --device cuda --precision "$2" --cuda-graph "$3" $size \
    --json "$OUT/steps-$2-$3.json" 2>&1 | tee -a "$OUT/steps.txt" | grep -v "^left out"
done

part "end"
ls "$OUT"
