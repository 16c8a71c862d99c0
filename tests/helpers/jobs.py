"""Jobs of two processes under `utils.launch`, which leave notes in a folder."""

from __future__ import annotations

from inspect import getsource
from pathlib import Path
from textwrap import indent

from ready_process import ReadyProcess, run_module, wait_for

_SCRIPT = '''\
import os, signal, sys, time
from pathlib import Path
sys.path.insert(0, os.getcwd())
from utils.command import guarded
from utils.errors import UserError
from utils.processes.stopping import Interrupted, StopRequest

RANK = int(os.environ["RANK"])
OTHER = Path(__file__).with_name(f"started-{{1 - RANK}}")

{is_alive}
def note(what):
    Path(__file__).with_name(f"{{what}}-{{RANK}}").write_text(str(os.getpid()))

def wait_until(condition):
    while not condition():
        time.sleep(0.02)

def lose_connection():
    """What a process does that talks to one that ends; gloo says it in many words."""
    wait_until(lambda: not is_alive(OTHER.read_text()))
    raise RuntimeError("Connection closed by peer")

def first():
{first}

def second():
{second}

def main():
    print("hello", flush=True)
    note("started")
    wait_until(lambda: OTHER.exists() and OTHER.read_text())  # else it could be ended before it says hello
    second() if RANK else first()

if __name__ == "__main__":
    guarded(main, trains=True)
'''


class Job:
    """Two processes with the given bodies, under a launcher that is started as the shell launchers do it.

    Args:
        folder: of their script and their notes, empty.
        first, second: what each of them does; the same if not given.
    """

    def __init__(self, folder: Path, first: str, second: str | None = None):
        self._folder = folder
        bodies = {"first": first, "second": second or first}
        lines = {name: indent(body, "    ") for name, body in bodies.items()}
        (folder / "job.py").write_text(_SCRIPT.format(is_alive=getsource(is_alive), **lines))
        self.launcher = launch(folder / "job.py", environment={"TMPDIR": str(folder)})

    def wait_for_notes(self, what: str) -> list[int]:
        """Wait until both processes have noted something; who they are."""
        files = [self._folder / f"{what}-{rank}" for rank in (0, 1)]
        wait_for(lambda: all(file.exists() and file.read_text() for file in files))
        return [int(file.read_text()) for file in files]

    def outcome(self) -> tuple[int, str, str, int]:
        """Exit code, standard output, the last line on standard error, and how many lines, or tracebacks, are there."""
        code, errors = self.launcher.ending()
        last = errors.rstrip().rpartition("\n")[2]
        return code, self.launcher.stdout.read(), last, errors.count("Traceback") or errors.count("\n")


def launch(script: str | Path, *words: str | Path, **options) -> ReadyProcess:
    """``python -m utils.launch 2 SCRIPT WORDS``."""
    return ReadyProcess(run_module, "utils.launch", "2", str(script), *map(str, words), **options)


def is_alive(pid: int | str) -> bool:
    """A process has not ended, whether or not anybody has asked how."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
