"""From a data set, a teacher and students to the runs that compare them, and to a table."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from datasets import open_data, readable_part
from datasets.source import Source
from utils.advise.candidates import Candidate, Choice, fit, make_candidates, measure
from utils.advise.outcome import conclude, finished
from utils.cli import DEFAULTS
from utils.config import Config, find_config
from utils.config.related import SingleRun
from utils.config.yaml_text import spell
from utils.errors import UserError, doing
from utils.files import check_writable, write_text
from utils.grid.command import queue_of, slots, visible_gpus
from utils.grid.plan import Job, plan, single_job
from utils.grid.pool import DONE
from utils.grid.slurm import read_request
from utils.processes.stopping import Interrupted
from utils.report.table import markdown
from utils.run_folder.read import SINGLE
from utils.training.accuracy import evaluate
from utils.training.device import choose_device
from utils.training.doubts import constant_accuracy, leaked_images, uneven_classes
from utils.training.dry_run import describe_network
from utils.training.facts import name_of
from utils.training.log import log_to_console
from utils.training.restore import Restored
from utils.training.run import find_missing_teacher

DEFAULT_DISTILLERS, DEFAULT_SELECTIONS = ("kd", "at", "crd", "dkd", "reviewkd"), ("fixed", "adaptive")
SEEDS = tuple(range(DEFAULTS["seed"], DEFAULTS["seed"] + 3))
NAMED = 10  # classes


def advise(
    dataset: str,
    teacher: str,
    students: Sequence[str],
    *,
    hours: float | None = None,
    distillers: Sequence[str] = DEFAULT_DISTILLERS,
    selections: Sequence[str] = DEFAULT_SELECTIONS,
    seeds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    teacher_overrides: Sequence[str] = (),
    jobs: int | None = None,
    slurm: Sequence[str] | None = None,
    anyway: bool = False,
    dry_run: bool = False,
) -> pd.DataFrame:
    """Train candidates, and say which student to ship.

    Args:
        dataset: a folder below ``configs/``.
        teacher: its network. It is trained first if it is missing and ``kd.teacher.checkpoint`` names no file.
        students: networks.
        hours: that everything may take. Candidates, seeds and epochs are fitted into them.
        distillers, selections: what is tried; the first selection without and with balanced spots.
        seeds: default three, with `hours` up to five.
        overrides: ``key=value`` words for the runs.
        teacher_overrides: the same for the teacher, if it is trained.
        jobs: runs at a time (default: one per GPU, or one).
        slurm: hand the runs to Slurm, with these ``key=value`` options of ``sbatch``.
        anyway: go on under a teacher that is no better than a student alone.
        dry_run: say what would run and for how long, and end.

    Returns:
        a row for each network and way of training, the best first; with `dry_run`, the candidates. Of its ``attrs``,
        ``best`` is the folder of the best run and ``failed`` the number of those that failed.

    Raises:
        UserError: something is wrong, or the teacher is of no use.
        Interrupted: a stop signal arrived; the same call goes on.
    """
    log_to_console()
    question = Question(
        dataset,
        teacher,
        tuple(dict.fromkeys(students)),
        tuple(dict.fromkeys(distillers)),
        tuple(selections),
        tuple(dict.fromkeys(seeds)) if seeds else None,
        hours,
        tuple(overrides),
        tuple(teacher_overrides),
    )
    how = {"at_a_time": jobs, "request": None if slurm is None else read_request(slurm, jobs)}
    config = question.config()
    folder = Path(config.run.root) / "advice"
    check_writable(folder)
    source = readable_part(open_data(config.dataset), config.dataset, config.training.num_workers)
    missing = find_missing_teacher(config, teacher_overrides)
    print("\n".join([*describe(source, config), *uneven_classes(source, config), *leaked_images(source)]))
    top1 = None if missing else teacher_top1(config, source)
    refuse_useless(top1, constant_accuracy(source.val.labels), "predicting the largest class for every image", anyway)
    choice = choose(question, config, source, missing, folder, jobs, slurm is not None)
    if dry_run:
        return pd.DataFrame([asdict(candidate) for candidate in choice.candidates])
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{config.dataset.label}.json", question.remember(choice))
    if missing:
        work([single_job(missing, Path(config.run.root))], Path(config.run.root), **how)
        top1 = teacher_top1(config, source)
    root = question.root(folder, choice)
    runs = question.jobs(choice, config, root)
    alone = [job for candidate, some in runs.items() for job in some if candidate.selection == SINGLE]
    distilled = [job for candidate, some in runs.items() for job in some if candidate.selection != SINGLE]
    failed = work(alone, root, **how)
    best = pd.DataFrame([(run.student, run.best_top1) for run in finished(alone)], columns=["student", "top1"])
    refuse_useless(top1, best.groupby("student")["top1"].mean().min(), "the students alone", anyway)
    failed += work(distilled, root, **how)
    table = conclude([*alone, *distilled], root)
    table.attrs["failed"] = failed
    return table


@dataclass(frozen=True)
class Question:
    """What advice is wanted about, see `advise`."""

    dataset: str
    teacher: str
    students: tuple[str, ...]
    distillers: tuple[str, ...]
    selections: tuple[str, ...]
    seeds: tuple[int, ...] | None
    hours: float | None
    overrides: tuple[str, ...]
    teacher_overrides: tuple[str, ...]

    def config(self) -> Config:
        """The config of the first student under the first distiller."""
        names = {"teacher": self.teacher, "student": self.students[0], "distiller": self.distillers[0]}
        return find_config(self.dataset, (self.seeds or SEEDS)[0], **names).load(self.overrides)

    def root(self, folder: Path, choice: Choice) -> Path:
        """Where the runs go: questions with the same settings share them."""
        digest = hashlib.sha256(
            json.dumps([sorted(self.overrides), sorted(self.teacher_overrides)]).encode()
        ).hexdigest()
        return folder / f"{choice.epochs}-epochs-{digest[:6]}"

    def jobs(self, choice: Choice, config: Config, root: Path) -> dict[Candidate, list[Job]]:
        """The runs of each candidate below `root`, all under one teacher."""
        teacher = f"kd.teacher.checkpoint={spell(str(config.teacher_checkpoint))}"
        words = [*self.overrides, f"run.root={spell(str(root))}", f"training.epochs={choice.epochs}", teacher]
        return {
            one: plan(
                self.dataset,
                [one.selection],
                [one.distiller],
                [f"{self.teacher}:{one.student}"],
                choice.seeds,
                words,
                sweep=one.sweep,
            )
            for one in choice.candidates
        }

    def remember(self, choice: Choice) -> str:
        """The question and its choice as JSON: it then gets the same runs again, even if a step takes longer."""
        return json.dumps({"question": asdict(self), **asdict(choice)}, indent=2) + "\n"

    def remembered(self, text: str) -> Choice | None:
        """The choice in what `remember` gave, if it was for this question."""
        known = json.loads(text)
        if known["question"] != json.loads(json.dumps(asdict(self))):
            return None
        candidates = (Candidate(**one | {"sweep": tuple(one["sweep"])}) for one in known["candidates"])
        return Choice(tuple(candidates), tuple(known["seeds"]), known["epochs"])


def describe(source: Source, config: Config) -> list[str]:
    """The data in a few lines."""
    counts = pd.Series(source.labels.bincount(minlength=source.num_classes).numpy(), source.class_names)
    counts = counts.sort_values(ascending=False, kind="stable")
    shown = counts if len(counts) <= NAMED else pd.concat([counts[: NAMED // 2], counts[-NAMED // 2 :]])
    which = "largest and smallest classes" if len(shown) < len(counts) else "classes"
    largest = source.class_names[int(source.val.labels.bincount().argmax())]
    return [
        f"{config.dataset.label}: {len(source.train):,} training and {len(source.val):,} validation images, "
        f"{source.num_classes} classes, {'x'.join(map(str, source.image_size))} pixels",
        f"training images of the {which}: {', '.join(f'{name} {count:,}' for name, count in shown.items())}",
        f"largest class: {largest}, {constant_accuracy(source.val.labels):.2f}% of the validation images",
    ]


def teacher_top1(config: Config, source: Source) -> float:
    """Accuracy of the teacher on the validation images, percent."""
    restored = Restored(config.teacher_checkpoint, config, {}, source, choose_device(config.training.device))
    network = restored.teacher()
    with closing(restored.val) as images:
        top1 = evaluate(network, images, restored.device, restored.autocast)["top1"]
    print(f"teacher {config.kd.teacher.title}: {top1:.2f}%, {describe_network(network.cpu(), source.image_size)}")
    return top1


def refuse_useless(top1: float | None, least: float, what: str, anyway: bool) -> None:
    """Raise a UserError if a teacher's accuracy is known and not better than `least`."""
    if top1 is None or not top1 <= least:  # NaN where no student is finished
        return
    line = f"the teacher has {top1:.2f}%, not more than {what}: {least:.2f}%"
    if not anyway:
        raise UserError(f"{line}; a better teacher is needed, or --anyway to distil all the same")
    print(f"warning: {line}")


def choose(
    question: Question,
    config: Config,
    source: Source,
    missing: SingleRun | None,
    folder: Path,
    jobs: int | None,
    on_slurm: bool,
) -> Choice:
    """What is going to run, said before it starts.

    Args:
        missing: trains the teacher.
        folder: may have the choice that was made when the question was first asked.
    """
    file = folder / f"{config.dataset.label}.json"
    with doing(f"reading {file}"):
        choice = question.remembered(file.read_text()) if file.exists() else None
    if choice:
        print(f"{choice}, as {file} says")
        return choice
    candidates = make_candidates(question.students, question.distillers, question.selections, config.kd.balance)
    choice = Choice(candidates, question.seeds or SEEDS, config.training.epochs)
    if on_slurm:
        if question.hours:
            raise UserError("--hours: not with --slurm, since the steps of other machines cannot be timed here")
        print(choice)
        return choice
    return fitted(choice, question, config, source, missing, jobs)


def fitted(
    choice: Choice, question: Question, config: Config, source: Source, missing: SingleRun | None, jobs: int | None
) -> Choice:
    """What can be trained of `choice` within the time that there is, told by a few steps of each candidate."""
    device, one_seed = choose_device(config.training.device), replace(choice, seeds=choice.seeds[:1])
    configs = {one: some[-1].config for one, some in question.jobs(one_seed, config, Path(config.run.root)).items()}
    durations, refused = measure(configs, source, device)
    if all(candidate.selection == SINGLE for candidate in durations):
        raise next(iter(refused.values()))
    for candidate, error in refused.items():
        print(f"left out: {candidate}: {error}")
    of_teacher, _ = measure({Candidate(question.teacher): missing.config}, source, device) if missing else ({}, {})
    before = sum(duration.of(missing.config.training.epochs) for duration in of_teacher.values())
    at_a_time = len(slots(jobs)) if visible_gpus() else 1  # runs that share the cores of a CPU take longer
    choice = replace(choice, candidates=tuple(durations))
    if question.hours:
        left = at_a_time * (3600 * question.hours - before)
        choice = fit(durations, choice, left, more_seeds=question.seeds is None)
    if dropped := [str(one) for one in durations if one not in choice.candidates]:
        print(f"left out for lack of time: {'; '.join(dropped)}")
    print(markdown(choice.table(durations)))
    duration = tqdm.format_interval(before + choice.seconds(durations) / at_a_time)
    first = f" after {missing.config.training.epochs} epochs of the teacher" if missing else ""
    print(f"{choice}{first}, about {duration} on {at_a_time} x {name_of(device)}")
    return choice


def work(jobs: Iterable[Job], root: Path, **how: object) -> int:
    """Run the jobs, all candidates with one seed before the next seed; the number of those that failed.

    Raises:
        Interrupted: a stop signal arrived.
    """
    jobs = sorted(jobs, key=lambda job: job.config.training.seed)
    with queue_of(jobs, logs=root / "grid", **how) as queue:
        outcomes = queue.work()
    if any(outcome.status not in (*DONE, "failed") for outcome in outcomes):
        raise Interrupted("stopped; the same command goes on")
    reasons = [str(outcome) for outcome in outcomes if outcome.reason]
    print(*reasons, sep="\n", end="\n" * bool(reasons))
    return sum(outcome.status not in DONE for outcome in outcomes)
