"""From lists of names to the runs of a grid."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path

from distillers.spot_adaptive.selection import SELECTIONS
from utils.config import Config, find_config
from utils.config.changes import OF_A_POLICY, deciding_settings, differences
from utils.config.layers import DROPS
from utils.config.related import SingleRun, single_run, teacher_run
from utils.config.yaml_text import spell
from utils.errors import UserError, reason
from utils.run_folder.layout import Layout
from utils.run_folder.read import SINGLE, is_locked, read_run

ROOT = Path(__file__).parents[2]

_DISTILLING_ONLY = ("kd.", "kd_loss.", "pretrain.")
_NOT_SWEPT = ("run.", "dataset.", "kd.teacher.")  # the runs of a sweep share their data and teachers
_OWN_OPTIONS = {
    "dataset.name": "--dataset",
    "training.seed": "--seeds",
    "kd.selection": "--selections",
    "kd_loss.name": "--distillers",
    "kd.teacher.name": "--pairs",
    "kd.student.name": "--pairs",
    "model.name": "--pairs",
}


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: for people.
        arguments: of the entry point `script`.
        config: that they compose.
        root: ``run.root`` of the grid; that of a run in a sweep is a folder in it.
        teacher: folder of the run that has to be finished first, if that is part of the grid.
        is_teacher: it is that of others, so that it is taken as it is once it is finished.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    config: Config
    root: Path
    teacher: Path | None = None
    is_teacher: bool = False

    @cached_property
    def folder(self) -> Path:
        return self.config.run_dir

    @property
    def epochs(self) -> int:
        return self.config.training.epochs

    def command(self, *, resume: bool) -> list[str]:
        return [sys.executable, str(ROOT / self.script), *self.arguments, *(["--resume"] if resume else [])]


@dataclass(frozen=True)
class State:
    """How far the run of a job is.

    Attributes:
        status: ``new``, ``unfinished``, ``finished``, ``busy`` while another process trains it, or ``unreadable``.
        differs: settings that decide a result and are not the job's, e.g. ``"training.lr 0.1, now 0.05"``; or why the
            folder cannot be read.
    """

    status: str
    differs: str = ""


def plan(
    dataset: str,
    selections: Sequence[str],
    distillers: Sequence[str],
    pairs: Sequence[str],
    seeds: Sequence[int],
    overrides: Sequence[str] = (),
    teacher_overrides: Sequence[str] = (),
    sweep: Sequence[str] = (),
) -> list[Job]:
    """All jobs, each folder once: per seed the teachers, then the students alone, then everything distilled.

    Args:
        selections: of ``kd.selection``, and ``single`` for the student alone.
        pairs: ``teacher-student``, or ``teacher:student`` where a name has a dash.
        overrides: ``key=value`` words for the runs; what a teacher shares with its student goes to it as well.
        teacher_overrides: ``key=value`` words for the teachers.
        sweep: ``key=value,value`` words; everything is done for each combination of their values. Keys of the policy
            are left out where there is none.

    Raises:
        UserError: a name or a key is wrong, or two runs of different settings have one folder; nothing has been started
            then.
    """
    for word in (*overrides, *teacher_overrides, *sweep):
        if option := _OWN_OPTIONS.get(word.partition("=")[0]):
            raise UserError(f"{word}: the option {option} sets this key; leave it out")
    networks = [split_pair(pair) for pair in pairs]
    to_distil = [selection for selection in selections if selection != SINGLE]
    if twice := [key for key, count in Counter(word.partition("=")[0] for word in sweep).items() if count > 1]:
        raise UserError(f"--sweep: {twice[0]} is given twice; give all of its values at once")
    combinations = list(product(*map(split_sweep, sweep)))  # one without words if there is no sweep
    jobs: list[Job] = []
    for seed in seeds:
        teachers, alone, distilled = [], [], []
        for swept in combinations:
            without = _without_policy(swept)
            words, kept = map(_of_the_student_alone, (overrides, without))
            alone += [_alone(dataset, seed, student, words, kept) for _, student in networks if SINGLE in selections]
            for (teacher, student), distiller, selection in product(networks, distillers, to_distil):
                names = (dataset, seed, teacher, student, distiller)
                used = swept if SELECTIONS[selection].policy else without
                pair = _distilled(names, [*overrides, f"kd.selection={selection}"], used, teacher_overrides)
                teachers += pair[:-1]
                distilled.append(pair[-1])
        jobs += [*sorted(teachers, key=lambda job: job.name), *alone, *distilled]
    # They bring PyTorch, for which a wrong key need not wait.
    from distillers.registry import DISTILLERS, LOGIT_LOSSES, POLICIES, check_options
    from models import find_builder

    for kd, loss in ((job.config.kd, job.config.kd_loss) for job in jobs if job.config.kd):
        check_options(DISTILLERS, loss.name, "kd_loss.options", loss.options)
        if loss.logits:  # else it depends on the distiller
            check_options(LOGIT_LOSSES, loss.logits, "kd_loss.logits_options", loss.logits_options)
        if SELECTIONS[kd.selection].policy:
            check_options(POLICIES, kd.policy, "kd.policy_options", kd.policy_options)
    roles = [network for job in jobs for network in (job.config.student, job.config.kd and job.config.kd.teacher)]
    for name in dict.fromkeys(network.name for network in roles if network):
        find_builder(name)  # refuses a name that it does not know
    return _each_folder_once(jobs)


def _each_folder_once(jobs: Iterable[Job]) -> list[Job]:
    """Raise a UserError if two jobs of different settings have one folder."""
    found: dict[Path, Job] = {}
    for job in jobs:
        first = found.setdefault(job.folder, job)
        changes = {} if first is job else differences(*(deciding_settings(j.config.to_dict()) for j in (first, job)))
        if not changes:
            continue
        key = min(changes, key=lambda key: key != "training.epochs")  # the drops may follow from that
        before, now = changes[key]
        if job.config.kd:
            raise UserError(f"{job.folder}: two runs would write there, with {key} {before} and with {now}")
        # Only a network alone has two roles, and teachers come first.
        raise UserError(
            f"{job.folder}: would be a teacher with {key} {before} and a student alone with {now}; "
            f"--teacher-arg {key}={now} makes them one run, or run single in a grid of its own, in another run.root"
        )
    return list(found.values())


def split_sweep(word: str) -> list[str]:
    """``"training.lr=0.05,0.1"`` → ``["training.lr=0.05", "training.lr=0.1"]``; a comma within brackets splits nothing.

    Raises:
        UserError: it is not of this form, or about the data, the teacher or the folder of a run.
    """
    key, sign, values = word.partition("=")
    split, depth = [""], 0
    for letter in values:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            split.append("")
        else:
            split[-1] += letter
    if key.startswith(_NOT_SWEPT):
        raise UserError(f"--sweep: found {word!r}; give each value of {key} a grid and a run.root of its own")
    if not (key and sign and all(split)):
        raise UserError(f"--sweep: found {word!r}, must be a config key and its values, e.g. training.lr=0.05,0.1")
    return [f"{key}={value}" for value in split]


def split_pair(pair: str) -> tuple[str, str]:
    """``"vgg13-vgg8"`` → ``("vgg13", "vgg8")``."""
    names = pair.split(":" if ":" in pair else "-")
    if len(names) != 2 or not all(names):
        raise UserError(f"pairs: found {pair!r}, must be teacher-student, or teacher:student where a name has a dash")
    return names[0], names[1]


def state(job: Job) -> State:
    """How far the job is already."""
    layout = Layout(job.folder)
    try:
        if is_locked(layout):
            return State("busy")
        if layout.best.exists() and not layout.config.exists():
            return State("finished")  # weights from elsewhere, put where a teacher's are looked for
        if not layout.begun:
            return State("new")
        run = read_run(job.folder)
    except OSError as error:  # one folder that cannot be entered stops no other run
        return State("unreadable", f"{job.folder}: {reason(error)}")
    if run is None:
        return State("unfinished")
    changes = differences(run.settings, deciding_settings(job.config.to_dict()))
    ended = run.status == "finished" and (job.is_teacher or run.epochs_done >= job.epochs)
    if run.epochs < job.epochs and not ended:  # it goes on, and the drops follow from the epochs
        for name in ("epochs", *DROPS):
            changes.pop(f"training.{name}", None)
    differs = ", ".join(f"{key} {old}, now {new}" for key, (old, new) in changes.items())
    return State("finished" if ended else "unfinished", differs)


def _of_the_student_alone(words: Sequence[str]) -> list[str]:
    """The `words` that are not about distilling, for a run of the student alone."""
    of_network = [
        word.replace("kd.student.", "model.", 1) if word.startswith("kd.student.") else word for word in words
    ]
    return [word for word in of_network if not word.startswith(_DISTILLING_ONLY)]


def _without_policy(words: Sequence[str]) -> list[str]:
    """The `words` that decide something where no policy chooses."""
    keys = tuple(f"{key}{end}" for key in OF_A_POLICY for end in "=.")
    return [word for word in words if not word.startswith(keys)]


def _alone(dataset: str, seed: int, student: str, overrides: Sequence[str], swept: Sequence[str]) -> Job:
    run = single_run(dataset, seed, student, overrides)
    root = Path(run.config.run.root)
    if swept:
        run = single_run(dataset, seed, student, [*overrides, *_in_its_folder(swept, root)])
    return single_job(run, root, swept)


def single_job(run: SingleRun, root: Path, swept: Sequence[str] = ()) -> Job:
    """The job of a network alone."""
    name = ", ".join([f"{run.config.title} alone, seed {run.config.training.seed}", *swept])
    return Job(name, "train_single.py", run.command.arguments, run.config, root)


def _distilled(
    names: tuple[str, int, str, str, str],
    overrides: Sequence[str],
    swept: Sequence[str],
    teacher_overrides: Sequence[str],
) -> list[Job]:
    """The run that trains the teacher, unless its checkpoint is given, and the distilled run.

    Args:
        names: data set, seed, teacher, student and distiller.
    """
    dataset, seed, teacher, student, distiller = names
    composed = find_config(dataset, seed, teacher=teacher, student=student, distiller=distiller)
    plain = composed.load(overrides)
    root, words, jobs = Path(plain.run.root), list(overrides), []
    if not plain.kd.teacher.checkpoint:
        jobs.append(replace(single_job(teacher_run(plain, teacher_overrides), root), is_teacher=True))
    if swept:
        words += [*_in_its_folder(swept, root), f"kd.teacher.checkpoint={spell(str(plain.teacher_checkpoint))}"]
    arguments = ("--dataset", dataset, "--seed", str(seed), "--net1", teacher, "--net2", student)
    arguments = (*arguments, "--distiller", distiller, *words)
    name = ", ".join([f"{distiller} {plain.kd.selection}, {teacher}-{student}, seed {seed}", *swept])
    config = composed.load(words) if swept else plain
    return [*jobs, Job(name, "train.py", arguments, config, root, jobs[0].folder if jobs else None)]


def _in_its_folder(swept: Sequence[str], root: Path) -> list[str]:
    """The words of one combination of a sweep, and one that gives it a folder of its own in `root`."""
    return [*swept, f"run.root={spell(str(root / ','.join(swept).replace('/', '_')))}"]
