"""What every command does alike: whatever goes wrong is one line and exit code 2."""

import importlib
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.cli import main_distill, main_single
from utils.command import guarded, whole_number
from utils.errors import UserError, doing, reason
from utils.processes.group import process_group
from utils.processes.rank import rank_info


@pytest.fixture
def ending(capfd):
    """Exit code and standard error of a main under the guard."""

    def call(main, **options) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ending:
            guarded(main, **options)
        return ending.value.code, capfd.readouterr().err

    return call


def raising(error: BaseException):
    def main():
        raise error

    return main


COMMANDS = ["config.__main__", "evaluate", "export", "convert", "inspect_gates", "report.__main__", "grid.__main__"]
COMMANDS += ["benchmark.__main__", "advise.__main__"]
MAINS = [importlib.import_module(f"utils.{name}").main for name in COMMANDS] + [main_single, main_distill]


@pytest.mark.parametrize("main", MAINS, ids=[*COMMANDS, "train_single", "train"])
def test_a_wrong_command_line_is_one_line(ending, main):
    code, errors = ending(lambda: main(arguments=["--no-such-option"]))
    assert code == 2
    assert errors.startswith("error: ")
    assert errors.endswith("; --help tells more\n")
    assert errors.count("\n") == 1


@pytest.mark.parametrize("text", ["", "x", "1.0", "0", "2147483648", "9" * 5000, "٣"])
def test_a_count_out_of_range_is_refused_whatever_its_length(text):
    with pytest.raises(Exception, match="must be a whole number from 1") as error:
        whole_number(1)(text)
    assert len(str(error.value)) < 120
    assert whole_number(1)("2147483647") == 2147483647


@pytest.mark.parametrize(
    ("main", "found"),
    [
        (raising(ImportError("libtorch_cpu.so: failed to map segment from shared object")), ""),
        (raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")), "2.00 GiB"),
        (lambda: torch.empty(2**55), "144115188075855872 bytes"),
        (lambda: torch.empty(2**33, 2**33), ""),
        (lambda: np.empty(2**55), "256. PiB"),
    ],
    ids=["import", "GPU", "PyTorch", "more bytes than numbers", "NumPy"],
)
def test_exhausted_memory_is_one_line(ending, main, found):
    line = "error: out of memory" + (f" (tried to allocate {found})" if found else "")
    assert ending(main) == (2, f"{line}\n")
    assert ending(main, trains=True) == (2, f"{line}; checkpoints written before are kept\n")


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (OSError(13, "Permission denied", "a\nb"), "error: a\\nb: Permission denied", 2),
        (BrokenPipeError(32, "Broken pipe"), "error: standard output: Broken pipe", 2),
        (KeyboardInterrupt(), "stopped at once", 130),
        (UserError("a\nb"), "error: a\\nb", 2),
    ],
    ids=str,
)
def test_only_what_trains_speaks_of_checkpoints(ending, error, line, code):
    assert ending(raising(error)) == (code, f"{line}\n")
    said = ending(raising(error), trains=True)[1]
    assert said.startswith(line)
    assert ("checkpoint" in said) == (not isinstance(error, UserError))


def test_the_unforeseen_is_one_line_that_names_the_place_and_a_file_with_the_traceback(ending, tmp_path):
    code, errors = ending(raising(RuntimeError("a bug")))
    assert code == 1
    assert errors.startswith("error: RuntimeError: a bug (tests/commands/test_command.py, line ")
    file = tmp_path / "mynet.py"
    file.write_text("\n\nint('a')\n")

    def main():
        with doing("importing mynet"):
            runpy.run_path(str(file))

    code, errors = ending(main)
    said, _, kept = errors.strip().partition("; traceback: ")
    assert code == 2
    assert said == (
        f"error: importing mynet failed: ValueError: invalid literal for int() with base 10: 'a' ({file}, line 3)"
    )
    assert Path(kept).read_text().startswith("Traceback (most recent call last)")
    assert "mynet.py" in Path(kept).read_text()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory"), "error: reading x failed: No such file or directory"),
        (PermissionError(13, "Permission denied", "x"), "error: reading x failed: Permission denied"),
        (PermissionError(13, "Permission denied", "y"), "error: reading x failed: y: Permission denied"),
        (UserError("x: better words"), "error: x: better words"),
        (MemoryError(), "error: out of memory"),
    ],
    ids=str,
)
def test_errors_that_speak_for_themselves_leave_no_traceback(ending, error, line):
    def main():
        with doing("reading x"):
            raise error

    assert ending(main) == (2, f"{line}\n")
    assert reason(KeyError(101)) == "KeyError: 101"
    assert reason(ValueError("not a\nnumber")) == "not a number"


def test_a_name_that_the_terminal_cannot_show_ends_nothing(ending):
    assert ending(lambda: print("\udcff")) == (0, "")


def test_output_that_nobody_takes_is_one_line():
    # The code is that of the command: a pipe's own would be that of its reader.
    script = f"{{ {sys.executable} -m utils.config; echo $? >&2; }} | (exec <&-; sleep 1)"
    found = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert found.stderr == "error: standard output: Broken pipe\n2\n"
    closed = subprocess.run(["bash", "-c", f"{sys.executable} -m utils.config --no 2>&-"], stdout=subprocess.PIPE)
    assert closed.returncode == 2
    assert closed.stdout.startswith(b"error: ")


def test_variables_that_another_program_left_are_refused_or_ignored(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    assert rank_info() == (0, 0, 1)
    monkeypatch.setenv("WORLD_SIZE", "4")
    refusal = r"^joining other processes, .* sets WORLD_SIZE .*variable MASTER_ADDR expected, but not set"
    with pytest.raises(UserError, match=refusal), process_group(torch.device("cpu")):
        raise AssertionError


PAIR = ["--dataset", "digits", "--teacher", "resnet14", "--student", "resnet8", "--distiller", "at"]
ALONE = ["--dataset", "digits", "--model", "resnet8"]


@pytest.mark.parametrize(
    ("main", "words", "line"),
    [
        (main_distill, [*PAIR, "net1=vgg13"], r"^command line: net1=vgg13: .* comes before sh \(net1=vgg13 sh train"),
        (main_distill, [*PAIR, "nproc=2"], r"comes before sh \(nproc=2 sh train"),
        (
            main_single,
            [*ALONE, "model= {name: x}", "training.epochs=0"],
            r"^(?!.*before sh)",
        ),  # a section of the config
        (main_single, ["--config", "configs/digits/seed-1029/single/vgg8.yml", "--seed", "3"], "seed beside --config"),
    ],
)
def test_a_word_of_the_launchers_in_a_wrong_place_is_told_where_it_belongs(main, words, line):
    with pytest.raises(UserError, match=line):
        main(arguments=words)
