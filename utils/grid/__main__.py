"""Run several selections x distillers x pairs x seeds of one data set, teachers first, and report on them.

Finished runs are skipped, unfinished ones are resumed, and those that fail are listed at the end. Grids on one run.root
share the work.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from distillers.spot_adaptive import selection
from utils.command import Parser, guarded, whole_number
from utils.errors import UserError
from utils.grid.command import (
    EXIT_FAILED,
    SWEEP,
    add_run_arguments,
    print_outcomes,
    queue_of,
    split_overrides,
)
from utils.grid.plan import Job, plan, state
from utils.grid.slurm import describe, read_request
from utils.processes.stopping import EXIT_INTERRUPTED, StopRequest
from utils.report.write import write_report
from utils.run_folder.read import find_runs

SELECTIONS = (*selection.SELECTIONS, "single")


def main(arguments: Sequence[str] | None = None) -> int:
    words, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
    parser = _parser()
    options = parser.parse_args(words)
    on_slurm = options.slurm is not None
    if options.detach and not on_slurm:
        parser.error("--detach: only with --slurm")
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
    request = read_request(options.slurm, options.jobs) if on_slurm else None
    root = jobs[0].root
    if options.dry_run:
        print("\n".join(describe(jobs, root / "grid") if on_slurm else map(_as_it_stands, jobs)))
        return 0
    with queue_of(jobs, request, options.jobs, root / "grid") as queue:
        if options.detach:  # Slurm goes on with the runs alone
            with StopRequest() as stop:
                queue.submit(stop)
            print("the same command without --detach watches them, with --dry-run it says how far they are")
            return EXIT_INTERRUPTED if stop.requested else 0
        outcomes = queue.work()
    _report(jobs, root, options.out)
    return print_outcomes(outcomes)


def _as_it_stands(job: Job) -> str:
    found = state(job)
    return f"{found.status:<10}  {job.name}  {job.folder}" + (f"  ({found.differs})" if found.differs else "")


def _report(jobs: Sequence[Job], root: Path, out: str | None) -> None:
    """Report on the jobs in `out`, or on all runs below `root` in its ``report/``, where an earlier one may stand."""
    try:
        runs = find_runs([job.folder for job in jobs if job.folder.is_dir()] if out else [root])
        print()
        write_report(runs, Path(out or root / "report"))
    except UserError as error:  # the list of what failed must still come
        print(f"no report: {error}")


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
    parser.add_argument("--detach", action="store_true", help="with --slurm: do not watch the runs")
    parser.add_argument(
        SWEEP,
        action="append",
        default=[],
        metavar="key=value,value",
        help="a config key and its values, e.g. training.lr=0.05,0.1; several are combined, and each combination has a "
        "folder of its own in run.root",
    )
    parser.add_argument(
        "--out",
        metavar="FOLDER",
        help="where a report of these runs goes (default: one of all runs in run.root, in its report/)",
    )
    parser.add_argument("--dry-run", action="store_true", help="list the runs and how far they are, and end")
    add_run_arguments(parser)
    return parser


if __name__ == "__main__":
    guarded(main)
