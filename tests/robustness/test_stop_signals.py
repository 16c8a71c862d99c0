"""SIGTERM and Ctrl-C at every moment of a command: one line, exit code 75, and no process left; 0 once it is done."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import Job, is_alive
from launchers import HERE
from process_runs import config_file, prepare, start
from ready_process import PATIENCE, REPOSITORY, wait_for

from utils.command import guarded
from utils.processes.stopping import (
    EXIT_INTERRUPTED,
    EXIT_KILLED,
    NOTHING_TO_SAVE,
    STOPPED_AT_ONCE,
    Interrupted,
    StopRequest,
)
from utils.training.log import log_to_file, set_aside


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_pytorch_is_imported_is_one_line(tmp_path, number):
    stand_in = tmp_path / "torch/__init__.py"
    stand_in.parent.mkdir()
    stand_in.write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    path = {"PATH": f"{HERE}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(tmp_path), "dataset": "digits"}
    process = subprocess.Popen(
        ["sh", "train.sh"],
        cwd=REPOSITORY,
        env=os.environ | path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.stdout.readline() != "importing\n":
        assert process.poll() is None
    process.send_signal(number)
    _, errors = process.communicate(timeout=PATIENCE)
    assert (process.returncode, errors) == (EXIT_INTERRUPTED, NOTHING_TO_SAVE + "\n")


@pytest.mark.parametrize(("handler", "stops"), [(signal.SIG_DFL, True), (signal.SIG_IGN, False)])
def test_a_closed_terminal_stops_a_command_unless_nohup_is_before_it(handler, stops):
    words = "import signal, utils.processes.stopping as s; print(signal.SIGHUP in s.STOP_SIGNALS)"
    start = {"cwd": REPOSITORY, "preexec_fn": lambda: signal.signal(signal.SIGHUP, handler), "text": True}
    assert subprocess.check_output([sys.executable, "-c", words], **start) == f"{stops}\n"


LEFT_ALONE = """
import os, sys, time
from utils.command import guarded
from utils.processes.stopping import EXIT_INTERRUPTED, StopRequest

def main():
    with StopRequest() as stop:
        print("waiting", flush=True)
        while not stop.requested:
            time.sleep(0.01)
    print("saving", flush=True)
    print("saving", file=sys.stderr, flush=True)
    return EXIT_INTERRUPTED

guarded(main)
"""


def test_a_command_ends_as_usual_though_its_terminal_is_gone():
    process, terminal = pty.fork()
    if not process:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        os.chdir(REPOSITORY)
        os.execv(sys.executable, [sys.executable, "-c", LEFT_ALONE])
    assert os.read(terminal, 7) == b"waiting"
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == EXIT_INTERRUPTED


def test_why_a_run_ends_is_told_though_its_log_cannot_be_written():
    with set_aside(), pytest.raises(Interrupted, match="all saved"), log_to_file(Path("/dev/full")):
        raise Interrupted("all saved")


class TestStopRequest:
    def test_a_signal_that_came_before_is_not_forgotten(self):
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Interrupted, match="nothing to save"), stop.at_once():
                raise AssertionError

    def test_a_signal_within_stops_at_once_and_one_after_is_remembered(self):
        with StopRequest() as stop:
            with pytest.raises(Interrupted), stop.at_once():
                os.kill(os.getpid(), signal.SIGINT)
            assert not stop.requested
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested

    def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not(self):
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.requested
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)


def test_a_closed_pipe_stops_a_training_as_a_closed_terminal_does(tmp_path):
    process = start(config_file(prepare(tmp_path), None), "training.epochs=100", "training.lr_decay_epochs=[]")
    process.wait_for_line("train 1/")
    process.stdout.close()
    assert process.wait() == EXIT_INTERRUPTED
    (log,) = tmp_path.rglob("log.txt")
    assert "all saved; the same command with --resume goes on" in log.read_text().splitlines()[-1]


def test_a_signal_after_the_last_line_is_too_late(tmp_path):
    process = start(config_file(prepare(tmp_path), None), "training.epochs=1", "training.lr_decay_epochs=[]")
    process.wait_for_line("curves: ")
    process.send_signal(signal.SIGTERM)
    assert process.ending() == (0, "")


def test_an_error_keeps_its_exit_code():
    with pytest.raises(SystemExit) as ending:
        guarded(lambda: os.stat("/no/such/file"))
    os.kill(os.getpid(), signal.SIGTERM)
    assert ending.value.code == 2


class TestSeveralProcesses:
    """Jobs of two processes, without PyTorch."""

    SAVING = """\
with StopRequest() as stop:
    note("working")
    wait_until(lambda: stop.requested)
    note("saved")
raise Interrupted("all saved")
"""
    SLOW = """\
with StopRequest() as stop:
    note("working")
    wait_until(lambda: stop.requested)
    note("asked")
    time.sleep(600)
"""
    FIRST_IS_DONE = """\
with StopRequest() as stop:
    note("working")
    wait_until(lambda: RANK == 0 or stop.requested)
"""

    @pytest.mark.parametrize(
        ("body", "number", "line"),
        [
            (SAVING, signal.SIGTERM, "all saved"),
            (SAVING, signal.SIGINT, "all saved"),
            ('note("working")\ntime.sleep(600)', signal.SIGTERM, NOTHING_TO_SAVE),
        ],
        ids=["SIGTERM", "SIGINT", "before training"],
    )
    def test_save_what_there_is_if_their_launcher_is_asked_to_stop(self, tmp_path, body, number, line):
        job = Job(tmp_path, body)
        job.wait_for_notes("working")
        job.launcher.send_signal(number)
        assert job.launcher.ending() == (EXIT_INTERRUPTED, line + "\n")
        assert body != self.SAVING or job.wait_for_notes("saved")

    def test_save_and_end_if_their_launcher_is_killed(self, tmp_path):
        job = Job(tmp_path, self.SAVING)
        workers = job.wait_for_notes("working")
        job.launcher.kill()
        assert job.wait_for_notes("saved") == workers
        wait_for(lambda: not any(map(is_alive, workers)))

    def test_end_at_once_at_the_second_ctrl_c(self, tmp_path):
        job = Job(tmp_path, self.SLOW)
        workers = job.wait_for_notes("working")
        job.launcher.send_signal(signal.SIGINT)
        job.wait_for_notes("asked")
        job.launcher.send_signal(signal.SIGINT)
        assert job.launcher.ending() == (EXIT_KILLED, STOPPED_AT_ONCE + "\n")
        wait_for(lambda: not any(map(is_alive, workers)))

    def test_that_are_done_are_not_stopped_any_more(self, tmp_path):
        job = Job(tmp_path, self.FIRST_IS_DONE)
        first, _ = job.wait_for_notes("working")
        wait_for(lambda: not is_alive(first))
        job.launcher.send_signal(signal.SIGTERM)
        assert job.launcher.ending() == (0, "")
