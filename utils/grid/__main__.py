"""Run several selections x distillers x pairs x seeds of one data set, teachers first, and report on them.

Finished runs are skipped, unfinished ones are resumed, and those that fail are listed at the end. Grids on one run.root
share the work.
"""

from __future__ import annotations

import os
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from distillers.spot_adaptive import selection
from utils.command import Parser, guarded, whole_number
from utils.errors import UserError
from utils.grid.plan import Job, plan, state
from utils.grid.pool import DONE, Outcome, Pool
from utils.grid.progress import Progress
from utils.grid.slurm import SlurmQueue, describe, read_request
from utils.processes.stopping import EXIT_INTERRUPTED, StopRequest
from utils.report.write import write_report
from utils.run_folder.read import read_run

EXIT_FAILED = 1
TEACHER_ARG = "--teacher-arg"
SWEEP = "--sweep"
SLURM = "--slurm"
SELECTIONS = (*selection.SELECTIONS, "single")


def main(arguments: Sequence[str] | None = None) -> int:
    words, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    options = _read(words)
    jobs = plan(
        options.dataset,
        options.selections,
        options.distillers,
        options.pairs,
        options.seeds,
        overrides,
        options.teacher_arg,
        options.sweep,
    )
    on_slurm = options.slurm is not None
    request = read_request(options.slurm) if on_slurm else None
    root = jobs[0].root
    if options.dry_run:
        here = (f"{state(job).status:<10}  {job.name}  {job.folder}" for job in jobs)
        print("\n".join(describe(jobs, root / "grid") if on_slurm else here))
        return 0
    progress = Progress(jobs)
    try:
        if on_slurm:
            queue = SlurmQueue(jobs, request, root / "grid", progress.say, progress)
        else:
            queue = Pool(jobs, slots(options.jobs), root / "grid", progress.say, progress)
        if options.detach:
            return leave(queue)
        outcomes = queue.work()
    finally:
        progress.close()
    _report(jobs, Path(options.out) if options.out else root / "report")
    return conclude(outcomes)


def leave(queue: SlurmQueue) -> int:
    """Hand the runs to Slurm and let it go on with them alone; the exit code."""
    with StopRequest() as stop:
        queue.submit(stop)
    print("the same command without --detach watches them, with --dry-run it says how far they are")
    return EXIT_INTERRUPTED if stop.requested else 0


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The ``key=value`` words apart from the rest; argparse would take them for further values of a list.

    Right behind ``--slurm``, words whose key has no dot are for Slurm.
    """
    words: list[str] = []
    overrides: list[str] = []
    for_slurm = False
    for word in arguments:
        for_slurm = word == SLURM or (for_slurm and "." not in word.partition("=")[0] and not word.startswith("-"))
        takes_it = for_slurm or (bool(words) and words[-1] in (TEACHER_ARG, SWEEP, "--out"))
        (overrides if "=" in word and not word.startswith("-") and not takes_it else words).append(word)
    return words, overrides


def conclude(outcomes: Sequence[Outcome]) -> int:
    """Print the counts, and the runs that are not done; the exit code."""
    counts = Counter(outcome.status for outcome in outcomes)
    print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()))
    for outcome in outcomes:
        if outcome.status not in DONE or outcome.reason:
            print(outcome)
    if counts["failed"]:
        return EXIT_FAILED
    return 0 if all(outcome.status in DONE for outcome in outcomes) else EXIT_INTERRUPTED


def slots(jobs: int | None) -> list[dict[str, str]]:
    """The environment of every process that may run at a time; GPUs are dealt out in turn.

    Args:
        jobs: how many; None: one per GPU, or one.
    """
    devices = visible_gpus()
    count = jobs or max(len(devices), 1)
    if devices:
        return [{"CUDA_VISIBLE_DEVICES": devices[k % len(devices)]} for k in range(count)]
    # Processes that each take all cores are slower than one after another.
    threads = max((os.cpu_count() or 1) // count, 1)
    return [{"OMP_NUM_THREADS": str(threads)} if count > 1 else {} for _ in range(count)]


def visible_gpus() -> list[str]:
    """Names under which CUDA knows the GPUs that this process may use."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(k) for k in range(count)]


def _report(jobs: Sequence[Job], out: Path) -> None:
    runs = [run for run in (read_run(job.folder) for job in jobs) if run is not None]
    if runs:
        print()
        try:
            write_report(runs, out)
        except UserError as error:  # the list of what failed must still come
            print(f"no report: {error}")


def _read(words: Sequence[str]) -> Namespace:
    parser = _parser()
    options = parser.parse_args(words)
    if options.slurm is None and options.detach:
        parser.error("--detach: only with --slurm")
    if options.slurm is not None and options.jobs:
        parser.error("--jobs: not with --slurm, where array=N says how many run at a time")
    return options


def _parser() -> Parser:
    parser = Parser(
        prog="python -m utils.grid",
        description=__doc__,
        epilog=f"Exit code: 0 all done, {EXIT_FAILED} a run failed, {EXIT_INTERRUPTED} stopped early; "
        "the same command goes on.",
    )
    parser.add_argument("--dataset", required=True, help="folder below configs/, e.g. cifar-100 or digits")
    parser.add_argument("--pairs", nargs="+", required=True, metavar="TEACHER-STUDENT", help="e.g. vgg13-vgg8")
    parser.add_argument("--distillers", nargs="+", default=["at"], metavar="NAME", help="e.g. at sp crd (default: at)")
    parser.add_argument(
        "--selections",
        nargs="+",
        choices=SELECTIONS,
        default=["single", "fixed", "adaptive"],
        metavar="NAME",
        help=f"of {' '.join(SELECTIONS)}; single is the student alone (default: single fixed adaptive)",
    )
    parser.add_argument("--seeds", nargs="+", type=whole_number(0), default=[1029], metavar="N", help="default: 1029")
    parser.add_argument(
        "--jobs", type=whole_number(1), metavar="N", help="runs at a time (default: one per GPU, or one)"
    )
    parser.add_argument(
        SLURM,
        nargs="*",
        metavar="key=value",
        help="hand every run to Slurm; the words are options of sbatch, e.g. gpus=1 partition=long time=12:00:00, and "
        "array=N lets N of an array run at a time",
    )
    parser.add_argument("--detach", action="store_true", help="with --slurm: do not watch the runs")
    parser.add_argument(
        TEACHER_ARG,
        action="append",
        default=[],
        metavar="key=value",
        help="a config key of the teachers that have to be trained; may be given several times",
    )
    parser.add_argument(
        SWEEP,
        action="append",
        default=[],
        metavar="key=value,value",
        help="a config key and its values, e.g. training.lr=0.05,0.1; several are combined, and each combination has a "
        "folder of its own in run.root",
    )
    parser.add_argument("--out", metavar="FOLDER", help="where the report goes (default: report/ in run.root)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and how far they are, and end")
    # Taken out by `split_overrides`; named here for --help.
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config keys, e.g. training.epochs=10; those of data, folder, device and precision hold for teachers too",
    )
    return parser


if __name__ == "__main__":
    guarded(main)
