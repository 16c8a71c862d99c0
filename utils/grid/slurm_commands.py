"""What the grid asks of Slurm: which jobs there are, and to take new ones. The words of ``--slurm`` are read here."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from utils.errors import UserError
from utils.files import write_text
from utils.grid.slurm_task import SlurmTask, text_of

SIGNAL = "B:USR1@120"  # two minutes before the time limit, to the process that hands it on to the training
OF_THE_GRID = ("dependency", "error", "job-name", "open-mode", "output")
ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED"}
ENDED |= {"REVOKED", "TIMEOUT"}
_FORMAT = "%j|%K|%F|%T|%r"  # name, place in the array, id, state, reason


@dataclass(frozen=True)
class Request:
    """What every job asks Slurm for.

    Attributes:
        keys: options of ``sbatch``.
        at_a_time: jobs of one array that may run at a time; None: as many as Slurm likes.
        processes: that share each batch, one per GPU.
    """

    keys: dict[str, str | bool]
    at_a_time: int | None = None
    processes: int = 1


@dataclass(frozen=True)
class Entry:
    """A job as Slurm sees it.

    Attributes:
        job: its id, e.g. ``"12"`` or ``"12_3"``.
        state: e.g. ``"PENDING"``; see ``man squeue``.
        reason: why it waits, e.g. ``"Dependency"``.
    """

    job: str
    state: str
    reason: str

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def read_request(words: Iterable[str]) -> Request:
    """The ``key=value`` words behind ``--slurm``.

    Raises:
        UserError: a word is none of these, or the grid needs the key itself.
    """
    keys: dict[str, str | bool] = {"requeue": True, "kill-on-invalid-dep": "yes", "signal": SIGNAL}
    for word in words:
        name, sign, value = word.partition("=")
        key = name.replace("_", "-").lstrip("-")
        if not (sign and value and re.fullmatch("[a-z][a-z-]+", key)) or not value.isprintable():
            raise UserError(f"--slurm: found {word!r}, must be a long option of sbatch and its value, e.g. gpus=1")
        if key in OF_THE_GRID:
            raise UserError(f"--slurm: found {word!r}, but the grid sets {key} itself")
        keys[key] = True if value == "true" else value
    if not str(keys["signal"]).startswith("B:"):
        keys["signal"] = f"B:{keys['signal']}"
    at_a_time = _count(keys.pop("array", None), "array", "the number of jobs that may run at a time")
    gpus = str(keys.get("gpus", "1")).rpartition(":")[2]  # that may be a type before
    return Request(keys, at_a_time, int(gpus) if re.fullmatch("[1-9][0-9]{0,3}", gpus) else 1)


def look_up(names: Iterable[str]) -> dict[tuple[str, int], Entry]:
    """What Slurm knows of the jobs with these names, by name and place in the array; also if they ended lately.

    Raises:
        UserError: it does not answer.
    """
    names = sorted(set(names))
    if not names:
        return {}
    command = ["squeue", "--noheader", "--array", "--states=all", f"--format={_FORMAT}", f"--name={','.join(names)}"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise UserError("--slurm: no squeue on the path; start the grid where jobs are submitted") from None
    except subprocess.TimeoutExpired:
        raise UserError("squeue: no answer for two minutes") from None
    if answer.returncode:
        raise UserError(f"squeue: {_first_line(answer.stderr) or f'exit code {answer.returncode}'}")
    return read_entries(answer.stdout)


def read_entries(text: str) -> dict[tuple[str, int], Entry]:
    """What ``squeue`` printed in our format."""
    entries = {}
    for line in text.splitlines():
        name, place, number, state, reason = line.split("|", 4)
        alone = not place.isdecimal()  # then it is N/A
        entries[name, 0 if alone else int(place)] = Entry(number if alone else f"{number}_{place}", state, reason)
    return entries


def require_submitit() -> None:
    """Raise a UserError where something is missing that submits jobs."""
    try:
        import submitit  # noqa: F401
    except ImportError:
        raise UserError("--slurm needs submitit: pip install submitit") from None
    if shutil.which("sbatch") is None or shutil.which("srun") is None:
        raise UserError("--slurm: no sbatch on the path; start the grid where jobs are submitted")


def submit(tasks: Sequence[SlurmTask], name: str, request: Request, teacher: str | None, folder: Path) -> list[str]:
    """Hand tasks to Slurm, several as one array.

    Args:
        name: of the jobs.
        teacher: id of the job without whose success they must not start.
        folder: for the list of tasks, submitit's files, and what a job prints outside of the training.

    Returns:
        their ids.

    Raises:
        UserError: Slurm refuses them.
    """
    import submitit

    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.json"
    write_text(file, text_of(tasks))
    executor = submitit.SlurmExecutor(folder=folder)
    executor.update_parameters(
        job_name=name,
        time=None,  # the partition's, not submitit's five minutes
        wckey=None,
        use_srun=False,
        stderr_to_stdout=True,
        dependency=teacher and f"afterok:{teacher}",
        array_parallelism=request.at_a_time or len(tasks),
        additional_parameters=request.keys,
    )
    if len(tasks) > 1:
        executor.parameters["map_count"] = len(tasks)
    try:
        # Not `executor.submit`, which pickles a function: a file is data here. With `exec` no shell is in the way of
        # the signals to the job's first process.
        command = ["exec", sys.executable, "-m", "utils.grid.slurm_task", str(file)]
        with redirect_stderr(StringIO()):  # where submitit repeats what sbatch says
            number = executor._submit_command(shlex.join(command)).job_id
    except submitit.core.utils.FailedJobError as error:
        file.unlink()
        raise UserError(f"--slurm: {_first_line(str(error)) or 'sbatch failed'}") from None
    return [f"{number}_{place}" for place in range(len(tasks))] if len(tasks) > 1 else [number]


def batch_log(folder: Path, job: str) -> Path:
    """Where a job prints what does not come from its training, Slurm's own messages among it."""
    return folder / f"{job}_0_log.out"


def _count(value: object, key: str, meaning: str) -> int | None:
    if value is None:
        return None
    if not re.fullmatch("[1-9][0-9]{0,4}", str(value), re.ASCII):
        raise UserError(f"--slurm: found {key}={value}, must be {meaning}")
    return int(str(value))


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]
