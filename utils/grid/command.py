"""What commands that start many runs have in common: their words, the processes at a time, and how they end."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from utils.command import Parser, whole_number
from utils.grid.plan import Job
from utils.grid.pool import DONE, Outcome, Pool
from utils.grid.progress import Progress
from utils.grid.slurm import Request, SlurmQueue
from utils.processes.rank import thread_share
from utils.processes.stopping import EXIT_INTERRUPTED

EXIT_FAILED = 1
TEACHER_ARG = "--teacher-arg"
SWEEP = "--sweep"
SLURM = "--slurm"


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


def add_run_arguments(parser: Parser) -> None:
    """Let `parser` read where the runs go, and what `split_overrides` has taken out, for --help."""
    parser.add_argument(
        "--jobs",
        type=whole_number(1),
        metavar="N",
        help="runs at a time (default: one per GPU, or one; on Slurm as many as it likes)",
    )
    parser.add_argument(
        SLURM,
        nargs="*",
        metavar="key=value",
        help="hand every run to Slurm; the words are options of sbatch, e.g. gpus=1 partition=long time=12:00:00",
    )
    parser.add_argument(
        TEACHER_ARG,
        action="append",
        default=[],
        metavar="key=value",
        help="a config key of the teachers that have to be trained; may be given several times",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config keys, e.g. training.epochs=10; those of data, folder, device and precision hold for teachers too",
    )


@contextmanager
def queue_of(
    jobs: Sequence[Job], request: Request | None, at_a_time: int | None, logs: Path
) -> Iterator[Pool | SlurmQueue]:
    """What works through the jobs, and says meanwhile how far it is.

    Args:
        request: what each asks Slurm for; None: they run on this machine.
        at_a_time: so many on this machine, see `slots`.
        logs: folder for what they print.
    """
    progress = Progress(jobs)
    arguments = jobs, logs, progress.say, progress
    try:
        yield Pool(slots(at_a_time), *arguments) if request is None else SlurmQueue(request, *arguments)
    finally:
        progress.close()


def slots(jobs: int | None) -> list[dict[str, str]]:
    """The environment of every process that may run at a time; GPUs are dealt out in turn.

    Args:
        jobs: how many; None: one per GPU, or one.
    """
    devices = visible_gpus()
    count = jobs or max(len(devices), 1)
    if devices:
        return [{"CUDA_VISIBLE_DEVICES": devices[k % len(devices)]} for k in range(count)]
    return [thread_share(count)] * count if count > 1 else [{}]


def visible_gpus() -> list[str]:
    """Names under which CUDA knows the GPUs that this process may use."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return named.split(",")[:count] if named else [str(k) for k in range(count)]


def print_outcomes(outcomes: Sequence[Outcome]) -> int:
    """Print the counts, and the runs that are not done; the exit code."""
    counts = Counter(outcome.status for outcome in outcomes)
    print("\n" + ", ".join(f"{count} {status}" for status, count in counts.items()))
    for outcome in outcomes:
        if outcome.status not in DONE or outcome.reason:
            print(outcome)
    if counts["failed"]:
        return EXIT_FAILED
    return 0 if all(outcome.status in DONE for outcome in outcomes) else EXIT_INTERRUPTED
