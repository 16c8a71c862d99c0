"""SIGTERM and Ctrl-C at every moment of a command: one line, exit code 75, and no process left; 0 once it is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from process_runs import REPOSITORY, config_file, prepare, start
from toy_runs import finish, make_engine

from utils.processes.stopping import (
    EXIT_INTERRUPTED,
    EXIT_KILLED,
    NOTHING_TO_SAVE,
    STOPPED_AT_ONCE,
    Interrupted,
    StopRequest,
)

PATIENCE = 60  # seconds
BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


def popen(*command: str, **environment: str) -> subprocess.Popen:
    """Start a command in a session of its own, with the tests' interpreter first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [str(word) for word in command],
        cwd=REPOSITORY,
        env=os.environ | {"PATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ending(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and standard error."""
    _, errors = process.communicate(timeout=PATIENCE)
    return process.returncode, errors


def wait_for(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class TestBeforeTraining:
    def test_nothing_that_takes_long_is_imported_before_signals_are_answered(self):
        program = "import sys, utils.launch, utils.cli; print({'torch', 'numpy', 'pydantic', 'yaml'} & {*sys.modules})"
        done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
        assert done.stdout == "set()\n"

    @BOTH
    def test_a_signal_while_pytorch_is_imported_is_one_line(self, tmp_path, number):
        stand_in = tmp_path / "torch/__init__.py"
        stand_in.parent.mkdir()
        stand_in.write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
        process = popen("sh", "train.sh", dataset="digits", PYTHONPATH=str(tmp_path))
        while process.stdout.readline() != "importing\n":
            assert process.poll() is None
        process.send_signal(number)
        assert ending(process) == (EXIT_INTERRUPTED, NOTHING_TO_SAVE + "\n")

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


class TestAfterTheEnd:
    @BOTH
    def test_a_signal_after_the_last_line_is_too_late(self, tmp_path, number):
        process = start(config_file(prepare(tmp_path), None), "training.epochs=1", "training.lr_decay_epochs=[]")
        while not process.stdout.readline().startswith("curves: "):
            assert process.poll() is None
        process.send_signal(number)
        assert ending(process) == (0, "")

    def test_an_error_keeps_its_exit_code(self):
        program = """
        import os, signal
        from utils.command import guarded
        from utils.errors import UserError
        def main():
            raise UserError("wrong")
        try:
            guarded(main)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
        """
        assert ending(popen(sys.executable, "-c", textwrap.dedent(program))) == (2, "error: wrong\n")


class TestTeacher:
    """``sh train.sh`` while it trains the teacher, and then ``sh train.sh --resume``."""

    @pytest.fixture(scope="class")
    @classmethod
    def stopped(cls, tmp_path_factory):
        folder = prepare(tmp_path_factory.mktemp("teacher"))
        keys = [f"dataset.root={folder}/images", "dataset.img_h=16", f"run.root={folder}/run", "training.epochs=1"]
        keys += ["training.batch_size=8", "training.num_workers=0", "validation.num_workers=0"]
        names = {"dataset": "imagefolder", "seed": "3", "net1": "resnet14", "net2": "resnet8", "distiller": "kd"}

        def run(*arguments: str, epochs: int) -> subprocess.Popen:
            quick = f"training.epochs={epochs} training.batch_size=8 training.num_workers=0"
            return popen("sh", "train.sh", *arguments, *keys, **names, teacher_args=quick)

        cls.runs = folder / "run/imagefolder/3"
        process = run(epochs=5000)
        wait_for((cls.runs / "resnet14/ckpt/last.pth").exists)
        process.send_signal(signal.SIGTERM)
        cls.end = ending(process)
        cls.group = process.pid
        cls.resumed = run("--resume", epochs=1)
        cls.resumed_end = ending(cls.resumed)

    def test_sigterm_to_the_shell_saves_it_and_ends_with_75(self, stopped):
        code, line = self.end
        assert code == EXIT_INTERRUPTED
        assert line.startswith("stopped in train ")
        assert line.endswith("all saved; the same command with --resume goes on\n")

    def test_leaves_nobody_behind(self, stopped):
        with pytest.raises(ProcessLookupError):
            os.killpg(self.group, 0)

    def test_the_same_command_with_resume_goes_on_with_it_and_then_trains_the_student(self, stopped):
        assert self.resumed_end == (0, "")
        assert (self.runs / "resnet14/result.json").exists()
        assert (self.runs / "adaptive-kd/resnet14-resnet8/result.json").exists()


class TestSeveralProcesses:
    """Jobs of two processes that note who they are and what they get to know, without PyTorch."""

    @pytest.fixture
    def job(self, tmp_path):
        def launch(body: str) -> subprocess.Popen:
            head = """\
            import os, sys, time
            from pathlib import Path
            sys.path.insert(0, os.getcwd())
            from utils.command import guarded
            from utils.processes.stopping import Interrupted, StopRequest

            RANK = int(os.environ["RANK"])

            def note(what):
                Path(__file__).with_name(f"{what}-{RANK}").write_text(str(os.getpid()))

            def wait_until(condition):
                while not condition():
                    time.sleep(0.02)

            def main():
            """
            script = tmp_path / "job.py"
            end = 'if __name__ == "__main__":\n    guarded(main, trains=True)\n'
            script.write_text(textwrap.dedent(head) + textwrap.indent(textwrap.dedent(body), "    ") + end)
            return popen(sys.executable, "-m", "utils.launch", "2", script, TMPDIR=str(tmp_path))

        return launch

    @pytest.fixture
    def wait_for_notes(self, tmp_path):
        """Wait until the processes have noted something; who they are."""

        def wait(what: str, ranks=(0, 1)) -> list[int]:
            files = [tmp_path / f"{what}-{rank}" for rank in ranks]
            wait_for(lambda: all(file.exists() and file.read_text() for file in files))
            return [int(file.read_text()) for file in files]

        return wait

    SAVING = """
    with StopRequest() as stop:
        note("started")
        wait_until(lambda: stop.requested)
        note("saved")
    raise Interrupted("all saved")
    """
    SLOW = """
    with StopRequest() as stop:
        note("started")
        wait_until(lambda: stop.requested)
        note("asked")
        time.sleep(600)
    """
    FIRST_IS_DONE = """
    with StopRequest() as stop:
        note("started")
        wait_until(lambda: RANK == 0 or stop.requested)
    """

    def test_save_and_end_if_their_launcher_is_killed(self, job, wait_for_notes):
        launcher = job(self.SAVING)
        workers = wait_for_notes("started")
        launcher.kill()
        assert wait_for_notes("saved") == workers
        wait_for(lambda: not any(map(is_alive, workers)))

    @BOTH
    def test_save_if_their_launcher_is_asked_to_stop(self, job, wait_for_notes, number):
        launcher = job(self.SAVING)
        wait_for_notes("started")
        launcher.send_signal(number)
        assert ending(launcher) == (EXIT_INTERRUPTED, "all saved\n")
        wait_for_notes("saved")

    def test_end_at_once_at_the_second_ctrl_c(self, job, wait_for_notes):
        launcher = job(self.SLOW)
        workers = wait_for_notes("started")
        launcher.send_signal(signal.SIGINT)
        wait_for_notes("asked")
        launcher.send_signal(signal.SIGINT)
        assert ending(launcher) == (EXIT_KILLED, STOPPED_AT_ONCE + "\n")
        wait_for(lambda: not any(map(is_alive, workers)))

    def test_that_are_done_are_not_stopped_any_more(self, job, wait_for_notes):
        launcher = job(self.FIRST_IS_DONE)
        first, _ = wait_for_notes("started")
        wait_for(lambda: not is_alive(first))
        launcher.send_signal(signal.SIGTERM)
        assert ending(launcher) == (0, "")


def test_validation_has_a_progress_bar_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    finish(make_engine(tmp_path / "run"))
    bars = capsys.readouterr().err
    assert "train 1/3:   0%|" in bars
    assert "validation:   0%|" in bars
    assert bars.index("validation:") < bars.index("train 2/3:")
