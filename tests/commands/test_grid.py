"""The grid: the runs that it plans, their order, sweeps, and runs that fail or stop."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from made_up_runs import write_run
from pictures import image_folder
from ready_process import ReadyProcess, run_script

from utils.config.yaml_text import spell
from utils.errors import UserError
from utils.grid.__main__ import main
from utils.grid.command import print_outcomes, slots, split_overrides
from utils.grid.plan import Job, plan, state
from utils.grid.pool import Outcome, Pool
from utils.grid.progress import Progress
from utils.processes.stopping import EXIT_INTERRUPTED

NAMES = {"dataset": "digits", "pairs": ["resnet20-resnet8"], "seeds": [1029]}


def jobs_of(root, selections=("fixed",), distillers=("at",), **changes):
    overrides = [f"run.root={spell(str(root))}", "training.epochs=4"]
    return plan(**NAMES | {"selections": selections, "distillers": distillers, "overrides": overrides} | changes)


def run_pool(monkeypatch, jobs, scripts, root, count=1, tick=lambda *_: None):
    """Let Python one-liners, by a part of the job's folder, stand in for training."""

    def command(job: Job, *, resume: bool) -> list[str]:
        script = next((text for part, text in scripts.items() if part in str(job.folder)), "pass")
        return [sys.executable, "-c", f"resume = {resume}; {script}"]

    monkeypatch.setattr(Job, "command", command)
    said: list[str] = []
    outcomes = Pool([{}] * count, jobs, root / "grid", said.append, tick).work()
    return {outcome.job.name.split(",")[0]: outcome for outcome in outcomes}, said


def test_teachers_come_first_then_students_alone_then_everything_distilled(tmp_path):
    jobs = jobs_of(tmp_path, ("fixed", "anti", "single"), ("at", "kd"), seeds=[1, 2])
    assert [job.name for job in jobs[:6]] == [
        "resnet20 alone, seed 1",
        "resnet8 alone, seed 1",
        "at fixed, resnet20-resnet8, seed 1",
        "at anti, resnet20-resnet8, seed 1",
        "kd fixed, resnet20-resnet8, seed 1",
        "kd anti, resnet20-resnet8, seed 1",
    ]
    assert len(jobs) == 12
    assert jobs[2].teacher == jobs[0].folder == tmp_path / "digits" / "1" / "resnet20"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"selections": ["single"], "pairs": ["resnet8-resnet9"]}, "unknown model 'resnet9': did you mean"),
        ({"pairs": ["resnet21-resnet8"]}, "unknown model 'resnet21': did you mean"),
        ({"pairs": ["resnet20-mynets.Net"]}, "model 'mynets.Net': importing 'mynets'"),
        ({"pairs": ["vgg13"]}, "pairs: found 'vgg13', must be teacher-student"),
        ({"overrides": ["training.epoch=4"]}, "unknown key"),
        ({"overrides": ["training.seed=5"]}, "training.seed=5: the option --seeds sets this key; leave it out"),
        ({"teacher_overrides": ["model.name=vgg8"]}, "model.name=vgg8: the option --pairs sets"),
        ({"sweep": ["kd.selection=fixed"]}, "kd.selection=fixed: the option --selections sets"),
        ({"sweep": ["training.lr=1", "training.lr=2"]}, "--sweep: training.lr is given twice"),
        ({"sweep": ["kd_loss.options={wrong: 1},{}"]}, "kd_loss.options: at has no option 'wrong'"),
        ({"overrides": ["kd_loss.logits=dkd", "kd_loss.logits_options.wrong=1"]}, "kd_loss.logits_options: dkd has no"),
        ({"sweep": ["training.lr"]}, "--sweep: found 'training.lr', must be"),
        ({"sweep": ["training.lr=1,,2"]}, "--sweep: found"),
        ({"sweep": ["run.root=a,b"]}, "--sweep: found"),
        (
            {"pairs": ["resnet20-resnet8", "resnet20-resnet14"], "overrides": ["kd.student.label=s"]},
            "resnet20-s: two runs would write there, with kd.student.name resnet8 and",
        ),
    ],
    ids=str,
)
def test_what_is_wrong_is_refused_before_anything_starts(tmp_path, monkeypatch, changes, line):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(Path(__file__).parents[2] / "configs")
    with pytest.raises(UserError) as error:
        jobs_of("run", **changes)
    assert line in str(error.value)
    assert not Path("run").exists()


def test_a_teacher_that_is_a_student_alone_as_well_is_one_run(tmp_path):
    pairs = ["resnet20-resnet14", "resnet14-resnet8"]
    with pytest.raises(UserError, match=r"14: would be a teacher with training.epochs 20 and a student alone with 4; "):
        jobs_of(tmp_path, ["single", "fixed"], pairs=pairs)
    jobs = jobs_of(tmp_path, ["single", "fixed"], pairs=pairs, teacher_overrides=["training.epochs=4"])
    assert [job.folder.name for job in jobs[:3]] == ["resnet14", "resnet20", "resnet8"]


def test_a_teacher_given_by_its_checkpoint_is_not_trained(tmp_path):
    jobs = jobs_of(tmp_path, pairs=["resnet20:resnet8"], overrides=["kd.teacher.checkpoint=somewhere.pth"])
    assert [job.script for job in jobs] == ["train.py"]


def test_keys_are_told_from_the_values_of_a_list_and_from_words_for_slurm():
    words = ["--seeds", "1", "2", "--teacher-arg", "training.lr=1", "--slurm", "gpus=1", "time=1:00:00", "--out", "a=b"]
    keys = ["training.epochs=3", "run.root=x"]
    assert split_overrides([keys[0], *words[:8], keys[1], *words[8:]]) == (words, keys)


def test_what_is_there_decides_between_starting_resuming_and_skipping(tmp_path):
    teacher, run = jobs_of(tmp_path)
    assert state(run).status == "new"
    (teacher.folder / "ckpt").mkdir(parents=True)
    (teacher.folder / "ckpt/best.pth").touch()  # put there by somebody, and not trained over
    assert state(teacher).status == "finished"
    shutil.rmtree(teacher.folder)
    write_run(tmp_path, selection="fixed", epochs=4, done=2, settings={"training": {"batch_size": 7}})
    assert state(run).status == "unfinished"
    assert "training.batch_size 7, now 64" in state(run).differs
    write_run(tmp_path, selection="single", student="resnet20", epochs=teacher.epochs)
    assert state(teacher).status == "finished"
    (teacher.folder / "ckpt/last.pth").rename(teacher.folder / "ckpt/best.pth")  # to save space
    assert state(teacher).status == "finished"
    (teacher.folder / "ckpt/best.pth").unlink()
    assert state(teacher).status == "new"


def test_a_finished_run_of_fewer_epochs_than_asked_for_is_resumed(tmp_path):
    write_run(tmp_path, selection="fixed", epochs=2)
    found = state(jobs_of(tmp_path)[1])
    assert found.status == "unfinished"
    assert "decay_epochs" not in found.differs, "the drops follow from the epochs"
    write_run(tmp_path / "longer", selection="fixed", epochs=20)
    found = state(jobs_of(tmp_path / "longer")[1])
    assert found.status == "finished"
    assert "training.epochs 20, now 4" in found.differs


def test_a_failing_run_and_a_folder_that_cannot_be_entered_stop_no_other(tmp_path, monkeypatch, capsys):
    def is_locked(layout):
        if "fixed-sp" in str(layout.path):
            raise PermissionError(13, "Permission denied")
        return False

    monkeypatch.setattr("utils.grid.plan.is_locked", is_locked)
    jobs = jobs_of(tmp_path, distillers=("at", "sp", "kd"))
    outcomes, _ = run_pool(monkeypatch, jobs, {"fixed-at": "raise ValueError('out of luck')"}, tmp_path)
    found = {name: outcome.status for name, outcome in outcomes.items()}
    assert found == {"resnet20 alone": "finished", "at fixed": "failed", "sp fixed": "failed", "kd fixed": "finished"}
    assert outcomes["sp fixed"].reason.endswith("resnet20-resnet8: Permission denied")
    assert print_outcomes(list(outcomes.values())) == 1
    assert "failed: at fixed, resnet20-resnet8, seed 1029: ValueError: out of luck" in capsys.readouterr().out


def test_without_its_teacher_nothing_is_started(tmp_path, monkeypatch):
    outcomes, _ = run_pool(monkeypatch, jobs_of(tmp_path), {"resnet20": "raise SystemExit(2)"}, tmp_path)
    assert outcomes["resnet20 alone"].status == "failed"
    assert (outcomes["at fixed"].status, outcomes["at fixed"].reason) == ("not started", "its teacher failed")


def test_what_is_finished_is_skipped_and_what_is_not_is_resumed(tmp_path, monkeypatch):
    jobs = jobs_of(tmp_path, distillers=("at", "kd"))
    write_run(tmp_path, selection="single", student="resnet20", epochs=jobs[0].epochs)
    write_run(tmp_path, selection="fixed", done=2)
    scripts = {"fixed-at": "assert resume", "fixed-kd": "assert not resume"}
    outcomes, said = run_pool(monkeypatch, jobs, scripts, tmp_path)
    assert [outcome.status for outcome in outcomes.values()] == ["skipped", "finished", "finished"]
    assert any(line.startswith("resume: at fixed") for line in said)


@pytest.mark.parametrize("asked", [True, False], ids=["SIGTERM", "an error of the grid"])
def test_the_running_jobs_save_themselves_before_the_grid_stops(tmp_path, monkeypatch, asked):
    def stop_when_ready(running, outcomes):
        if (tmp_path / "ready").exists() and not asked:
            raise OSError("disk full")
        if (tmp_path / "ready").exists():
            os.kill(os.getpid(), signal.SIGTERM)

    saved = f"(pathlib.Path({str(tmp_path / 'saved')!r}).touch(), sys.exit({EXIT_INTERRUPTED}))"
    script = (
        f"import signal, sys, time, pathlib; signal.signal(signal.SIGTERM, lambda *_: {saved}); "
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(60)"
    )
    with nullcontext() if asked else pytest.raises(OSError, match="disk full"):
        outcomes, _ = run_pool(monkeypatch, jobs_of(tmp_path), {"resnet20": script}, tmp_path, tick=stop_when_ready)
    assert (tmp_path / "saved").exists()
    if asked:
        assert [outcome.status for outcome in outcomes.values()] == ["stopped", "not started"]
        assert print_outcomes(list(outcomes.values())) == EXIT_INTERRUPTED


def test_gpus_are_dealt_out_in_turn(monkeypatch):
    monkeypatch.setattr("utils.grid.command.visible_gpus", lambda: ["3", "5"])
    assert slots(None) == [{"CUDA_VISIBLE_DEVICES": "3"}, {"CUDA_VISIBLE_DEVICES": "5"}]
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots(3)] == ["3", "5", "3"]
    monkeypatch.setattr("utils.grid.command.visible_gpus", list)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert slots(None) == [{}]
    assert [slot["OMP_NUM_THREADS"] for slot in slots(3)] == ["2", "2", "2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")  # the user knows better
    assert slots(3) == [{}, {}, {}]


def test_progress_names_running_jobs_and_the_time_of_the_epochs_to_go(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr("utils.grid.progress.time", SimpleNamespace(monotonic=lambda: now))
    teacher, *jobs = jobs_of(tmp_path, ("fixed", "adaptive", "anti", "random"), ("at",))
    write_run(tmp_path, selection="fixed", epochs=4, done=1)
    progress = Progress([teacher, *jobs])
    assert progress.line([], {}) == "[0/5] left not known before the first epoch"
    write_run(tmp_path, selection="adaptive", epochs=4, done=2)
    pair = "resnet20-resnet8, seed 1029"
    now = 30.0
    # 8 epochs of the teacher and 2 of the students in 30 s; 9 to go, since a student has failed
    ended = {teacher.folder: Outcome(teacher, "finished"), jobs[-1].folder: Outcome(jobs[-1], "failed")}
    assert progress.line(jobs[:3], ended) == (
        f"[2/5] left 00:27 | at fixed, {pair}: epoch 2/4 | at adaptive, {pair}: epoch 3/4 | at anti, {pair}: epoch 1/4"
    )


class TestTwoGridsOnOneRoot:
    def test_share_the_work(self, tmp_path, monkeypatch):
        """The other grid trains the teacher meanwhile, and has finished it when its lock is gone."""
        monkeypatch.setattr("utils.grid.pool.BUSY_SECONDS", 0.05)
        teacher, student = jobs_of(tmp_path)
        log = tmp_path / "grid/digits-1029-resnet20.txt"
        log.parent.mkdir()
        other = log.open("w")
        other.write("the other one's")
        other.flush()
        fcntl.flock(other, fcntl.LOCK_EX)
        ticks = iter(range(10**6))

        def finish_after_a_while(running, outcomes):
            if next(ticks) == 5:
                write_run(tmp_path, selection="single", student="resnet20", epochs=teacher.epochs)
                other.close()

        outcomes, said = run_pool(monkeypatch, [teacher, student], {}, tmp_path, tick=finish_after_a_while)
        assert [outcome.status for outcome in outcomes.values()] == ["skipped", "finished"]
        assert said.count("waiting: resnet20 alone, seed 1029: another process trains it") == 1
        assert log.read_text() == "the other one's"

    def test_a_run_keeps_its_log_locked_when_its_grid_is_killed(self, tmp_path, monkeypatch):
        """What the process inherits is the lock, so it ends with the process."""
        monkeypatch.setattr("utils.grid.pool.BUSY_SECONDS", 0.05)
        script = (
            f"import fcntl; other = open({str(tmp_path / 'grid/digits-1029-resnet20.txt')!r})\n"
            "try: fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
            "except BlockingIOError: pass\n"
            "else: raise SystemExit(1)"
        )
        outcomes, _ = run_pool(monkeypatch, jobs_of(tmp_path)[:1], {"resnet20": script}, tmp_path)
        assert outcomes["resnet20 alone"].status == "finished"


def test_a_sweep_has_a_folder_for_each_combination_and_shares_the_teacher(tmp_path):
    sweep = ["kd_loss.homo=true,false", "training.lr=0.05,0.1"]
    tmp_path = tmp_path / "runs #1: all"
    teacher, *others = jobs_of(tmp_path, ("single", "fixed", "adaptive"), sweep=sweep)
    assert teacher.folder == tmp_path / "digits/1029/resnet20"
    folders = [f"training.lr={lr}/digits/1029/resnet8" for lr in (0.05, 0.1)]
    fixed = [job for job in others if job.config.kd and job.config.kd.selection == "fixed"]
    assert [job.config.training.lr for job in fixed] == [0.05, 0.1], "there is no policy that homo could change"
    combinations = [(homo, lr) for homo in ("true", "false") for lr in (0.05, 0.1)]
    others = [job for job in others if job not in fixed]
    for job, (homo, lr) in zip(others[2:], combinations, strict=True):
        assert job.name == f"at adaptive, resnet20-resnet8, seed 1029, kd_loss.homo={homo}, training.lr={lr}"
        folders.append(f"kd_loss.homo={homo},training.lr={lr}/digits/1029/adaptive-at/resnet20-resnet8")
        assert (str(job.config.kd_loss.homo).lower(), job.config.training.lr) == (homo, lr)
        assert job.teacher == teacher.folder
        assert job.config.teacher_checkpoint == teacher.folder / "ckpt/best.pth"
    assert [str(job.folder.relative_to(tmp_path)) for job in others] == folders


def test_a_sweep_over_keys_of_the_policy_is_none_where_there_is_no_policy(tmp_path):
    words = ["kd.gate_temperature=4,8", "training.lr_agent=0.1,0.2"]
    jobs = jobs_of(tmp_path, ("single", "fixed", "adaptive"), sweep=words)
    names = [job.name.partition(",")[0] for job in jobs]
    assert sorted(names) == [*4 * ["at adaptive"], "at fixed", "resnet20 alone", "resnet8 alone"]


def test_a_sweep_may_have_mappings_and_lists_as_values(tmp_path):
    sweep = ["kd_loss.options={distance: 1, angle: 2},{angle: 3}", "kd_loss.spots=[[1, 1], [2, 2]],[[1, 1]]"]
    jobs = [job for job in jobs_of(tmp_path, ("fixed",), ("rkd",), sweep=sweep) if job.config.kd]
    found = [(job.config.kd_loss.options, len(job.config.kd_loss.spots)) for job in jobs]
    assert found == [(options, spots) for options in ({"distance": 1, "angle": 2}, {"angle": 3}) for spots in (2, 1)]
    assert len({job.folder for job in jobs}) == 4


def test_a_finished_teacher_is_taken_as_it_is(tmp_path):
    teacher, _ = jobs_of(tmp_path)
    write_run(tmp_path, selection="single", student="resnet20", epochs=3)
    found = state(teacher)
    assert (found.status, "training.epochs 3, now 8" in found.differs) == ("finished", True)
    assert state(replace(teacher, is_teacher=False)).status == "unfinished", "a run of the grid's own goes on"


def test_a_real_grid_trains_the_teacher_and_the_student_and_reports(tmp_path, monkeypatch, capsys):
    """The runs are forked from a process that has imported PyTorch."""

    def start(command, *, stdout, env, **_):
        return ReadyProcess(run_script, *command[1:], stdout=stdout, stderr=stdout, environment=env)

    constants = {"STDOUT": subprocess.STDOUT, "DEVNULL": subprocess.DEVNULL}
    monkeypatch.setattr("utils.grid.pool.subprocess", SimpleNamespace(Popen=start, **constants))
    monkeypatch.setattr("utils.report.style.DPI", 20)
    data = image_folder(tmp_path / "images", train=4, val=4, size=(8, 16))
    write_run(tmp_path / "run", selection="fixed", distiller="crd")  # of an earlier grid
    arguments = [
        *["--dataset", "imagefolder", "--pairs", "resnet8-resnet8", "--distillers", "kd", "--selections", "adaptive"],
        *["--teacher-arg", "training.epochs=1", "--teacher-arg", "training.batch_size=4"],
        *["training.epochs=1", "training.batch_size=4", "training.num_workers=0", "validation.num_workers=0"],
        *[f"dataset.root={data}", "dataset.img_h=8", "training.device=cpu", f"run.root={tmp_path / 'run'}"],
    ]
    assert main(arguments) == 0
    run = tmp_path / "run/imagefolder/1029/adaptive-kd/resnet8-resnet8"
    assert "teacher_top1" in json.loads((run / "result.json").read_text())
    facts = json.loads((run / "facts.json").read_text())
    assert (facts["train_images"], facts["classes"], facts["image_size"]) == (8, 2, [8, 64])
    assert facts["parameters"] == facts["teacher_parameters"] > 0
    assert "crd" in (tmp_path / "run/report/report.html").read_text()
    capsys.readouterr()
    assert main([*arguments, "--dry-run"]) == 0
    assert capsys.readouterr().out.count("finished") == 2
