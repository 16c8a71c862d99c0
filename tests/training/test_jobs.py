"""Jobs of several processes: started by a launcher, and ended as one, with one line."""

import json
import shutil

import pytest
from jobs import Job
from launchers import quick_sh
from pictures import image_folder

from utils.errors import UserError
from utils.launch import main as launcher_main

KILL = "os.kill(os.getpid(), signal.SIGKILL)"
KILLED = "error: process 2 of 2 was ended by SIGKILL; is there enough memory?"

# What the first process does, and the second one; exit code, and the only line or traceback on standard error.
FAILURES = {
    "an error": ("lose_connection()", 'raise UserError("part 1 is bad")', 2, "error: part 1 is bad"),
    "an error everywhere": ('raise UserError("bad")', 'raise UserError("bad")', 2, "error: bad"),
    "a crash": ("time.sleep(600)", "1 / 0", 1, "error: ZeroDivisionError: division by zero"),
    "a death": ("lose_connection()", KILL, 137, KILLED),
}


def test_one_process_that_fails_ends_the_job_and_is_the_only_one_to_say_why(tmp_path):
    jobs = {}
    for name, (first, second, _, _) in FAILURES.items():
        (tmp_path / name).mkdir()
        jobs[name] = Job(tmp_path / name, first, second)
    found = {name: job.outcome() for name, job in jobs.items()}
    code, out, line, count = found["a crash"]
    found["a crash"] = code, out, line.partition(" (")[0], count  # without the place and the file of the traceback
    assert found == {name: (code, "hello\n", line, 1) for name, (_, _, code, line) in FAILURES.items()}


def test_a_full_folder_for_temporary_files_keeps_the_line_and_the_exit_code(tmp_path):
    full = """\
import builtins
real = open
def no_space(file, mode="r", *words, **options):
    opened = real(file, mode, *words, **options)
    if "x" in mode:
        opened.close()
        raise OSError(28, "No space left on device")
    return opened
builtins.open = no_space
raise Interrupted("all saved")
"""
    code, errors = Job(tmp_path, full).launcher.ending()
    assert code == 75
    assert set(errors.splitlines()) == {"all saved"}


@pytest.mark.parametrize("count", ["two", "0", "٣", "9" * 5000])
def test_a_number_of_processes_that_is_none_is_refused(count):
    with pytest.raises(UserError, match=r"^nproc: '.{0,60}', expected the number of processes, 1 or more$"):
        launcher_main([count, "train.py"])


WATCHED = """\
import atexit, os
from contextlib import suppress
from pathlib import Path
from models import get_model

def note_threads():
    names = []
    for thread in os.listdir("/proc/self/task"):
        with suppress(OSError):  # some are about to end
            names.append(Path("/proc/self/task", thread, "comm").read_text())
    Path(__file__).with_name(os.environ["RANK"]).write_text("".join(name for name in names if "gloo" in name))

def Net(num_classes):
    atexit.register(note_threads)
    return get_model("resnet8", num_classes)
"""


def test_nproc_shares_a_run_among_processes_in_which_the_threads_of_gloo_end_with_the_group(tmp_path):
    """Else they may abort a finished process at its exit. The first step of an optimiser imports much of PyTorch."""
    root = image_folder(tmp_path / "data", train=10, val=5, size=(16, 16))
    shutil.copytree(root / "val", root / "test")
    (tmp_path / "watched.py").write_text(WATCHED)
    # DistributedDataParallel, which is not used, would warn about the strides of channels_last.
    settings = {"batch_size": 8, "epochs": 1, "num_workers": 0, "channels_last": "true"}
    words = [f"training.{key}={value}" for key, value in settings.items()]
    words += [f"dataset.root={root}", "dataset.img_h=16", "validation.num_workers=0", f"run.root={tmp_path / 'run'}"]
    variables = {"nproc": "2", "dataset": "imagefolder", "model": "watched.Net", "PYTHONPATH": str(tmp_path)}
    done = quick_sh("train_single.sh", *words, **variables)
    assert (done.returncode, done.stderr) == (0, "")
    assert "| 2 processes, each on " in done.stdout
    assert done.stdout.count("best val") == 1
    assert [(tmp_path / number).read_text() for number in "01"] == ["", ""]
    result = json.loads(next((tmp_path / "run").rglob("result.json")).read_text())
    assert result["test_top1"] == result["best_top1"] >= 0
