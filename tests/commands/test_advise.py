"""Advice: which runs are planned, how they are fitted into some hours, and what is said of them in the end."""

from contextlib import nullcontext
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from pictures import image_folder

from models import get_model
from utils.advise import advise
from utils.advise.__main__ import main
from utils.advise.candidates import Candidate, Choice, Duration, fit, make_candidates
from utils.cli import main_distill, main_single
from utils.errors import UserError
from utils.grid.plan import plan
from utils.grid.pool import Outcome
from utils.grid.slurm import IN_SLURM
from utils.processes.stopping import Interrupted

DURATION = Duration(step=0.1, start=10.0, epoch=1.0)


class HereAndNow(nullcontext):
    """Trains the jobs of a queue within this process."""

    def __init__(self, jobs, *_, **__):
        super().__init__(self)
        self.jobs = jobs

    def work(self):
        for job in self.jobs:
            if not (job.folder / "result.json").exists():
                (main_single if job.script == "train_single.py" else main_distill)(arguments=list(job.arguments))
        return [Outcome(job, "finished") for job in self.jobs]


def be_quick(monkeypatch):
    """Train in this process, time one step and one forward pass, and draw coarsely."""
    monkeypatch.setattr("utils.advise.advice.queue_of", HereAndNow)
    monkeypatch.setattr("utils.report.style.DPI", 20)
    for name in ("evaluate.TIMED", "training.dry_run.TIMED", "training.dry_run.WARM_UP"):
        monkeypatch.setattr(f"utils.{name}", 1)


@pytest.fixture
def images(tmp_path, monkeypatch):
    """Words for a few images of two classes, and a teacher that has learnt nothing."""
    be_quick(monkeypatch)
    image_folder(tmp_path / "images", train=4, val=2, size=(16, 16))
    torch.manual_seed(5)
    torch.save(get_model("resnet14", 2).state_dict(), tmp_path / "teacher.pth")
    keys = ["dataset.img_h=16", "dataset.img_w=16", f"dataset.root={tmp_path}/images", f"run.root={tmp_path}/run"]
    keys += ["training.epochs=1", "training.batch_size=4", "training.num_workers=0", "validation.num_workers=0"]
    return [*keys, f"kd.teacher.checkpoint={tmp_path}/teacher.pth"]


WORDS = ["--dataset", "imagefolder", "--teacher", "resnet14", "--students", "resnet8", "--selections", "fixed"]


def test_advice_from_images_to_a_table_and_its_repetition(images, tmp_path, capsys):
    words = [*WORDS, "--distillers", "at", "--seeds", "1", "--anyway", *images]
    assert main([*words, "--dry-run"]) == 0
    assert "| resnet8 at, fixed, kd.balance=0.5 " in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "imagefolder: 8 training and 4 validation images, 2 classes, 16x16 pixels" in said
    assert "largest class: ant, 50.00% of the validation images" in said
    assert "teacher resnet14: " in said
    assert "3 candidates, seeds 1, 1 epochs: 3 runs, about " in said
    assert "Best student: resnet14 → resnet8, " in said
    (root,) = tmp_path.glob("run/advice/1-epochs-*")
    table = pd.read_csv(root / "advice.csv")
    assert set(table["training"]) == {"alone", "teacher", "at, fixed", "at, fixed, kd.balance=0.5"}
    assert table["top-1 (%)"].str.endswith("(1)").sum() == 3
    assert table["gain over alone"].notna().sum() == 2
    assert (root / "advice.png").read_bytes().startswith(b"\x89PNG")
    again = advise("imagefolder", "resnet14", ["resnet8"], distillers=["at"], selections=["fixed"], seeds=[1],
                   overrides=images, anyway=True)  # fmt: skip
    assert list(again["training"]) == list(table["training"])
    assert f"3 runs, as {tmp_path}/run/advice/imagefolder.json says" in capsys.readouterr().out


def test_a_student_is_validated_once_however_it_is_trained(images, monkeypatch):
    monkeypatch.setattr("utils.advise.advice.teacher_top1", lambda *_: 60.0)
    validated = []
    monkeypatch.setattr("utils.advise.candidates.evaluate", lambda student, *_: validated.append(student))
    names = ["resnet8", "resnet14"]
    main([*WORDS, "--students", *names, "--distillers", "kd", "dkd", "--dry-run", *images])
    assert [len(student.state_dict()) for student in validated] == [
        len(get_model(name, 2).state_dict()) for name in names
    ]


def test_what_cannot_be_trained_is_left_out(images, monkeypatch, capsys):
    monkeypatch.setattr("utils.advise.advice.teacher_top1", lambda *_: 60.0)
    words = [*WORDS, "--teacher", "wrn_16_2", "--dry-run", *images, "--distillers", "fsp"]
    main([*words, "kd"])
    said = capsys.readouterr().out
    assert "left out: resnet8 fsp, fixed, kd.balance=null: " in said
    assert "2 candidates, seeds 1029 1030 1031, 1 epochs: 6 runs" in said
    with pytest.raises(UserError, match="fsp"):
        main(words)


def test_a_teacher_that_is_no_better_than_a_student_alone_is_refused(images, monkeypatch):
    monkeypatch.setattr("utils.advise.advice.teacher_top1", lambda *_: 60.0)
    monkeypatch.setattr("utils.advise.advice.finished", lambda _: [SimpleNamespace(student="a", best_top1=60.0)])
    with pytest.raises(UserError, match=r"the teacher has 60.00%, not more than the students alone: 60.00%.*--anyway"):
        main([*WORDS, "--distillers", "kd", "--seeds", "1", *images])


def test_what_stops_while_slurm_goes_on_begins_no_further_runs(images, monkeypatch):
    monkeypatch.setattr(HereAndNow, "work", lambda self: [Outcome(job, IN_SLURM) for job in self.jobs])
    with pytest.raises(Interrupted, match="the same command goes on"):
        main([*WORDS, "--distillers", "kd", "--seeds", "1", "--anyway", *images])


def test_the_student_alone_is_built_as_the_distilled_one():
    words = ["kd.student.kwargs.width=2", "kd.teacher.checkpoint=t.pth", "training.lr=0.2"]
    (job,) = plan("digits", ["single"], ["at"], ["resnet20-resnet8"], [1], words)
    assert (job.config.model.kwargs, job.config.training.lr) == ({"width": 2}, 0.2)


def test_students_alone_come_first_and_only_what_has_spots_is_balanced():
    found = make_candidates(["a", "b"], ["kd", "at"], ["fixed", "adaptive"])
    assert list(map(str, found[:5])) == [
        "a alone",
        "b alone",
        "a kd, fixed",
        "b kd, fixed",
        "a at, fixed, kd.balance=null",
    ]
    assert [str(one) for one in found if one.sweep] == [
        f"{student} at, fixed, kd.balance={value}" for value in ("null", "0.5") for student in "ab"
    ]
    assert str(found[-1]) == "b at, adaptive"


@pytest.mark.parametrize(
    ("seconds", "kept", "seeds", "epochs"),
    [
        (10**6, 3, (1, 2, 3, 4, 5), 40),  # five seeds at most
        (4 * 3 * 50, 3, (1, 2, 3, 4), 40),
        (3 * 3 * 30, 3, (1, 2, 3), 20),
        (3 * 2 * 20, 2, (1, 2, 3), 10),
        (2 * 20, 2, (1,), 10),
    ],
)
def test_what_fits_into_some_time(seconds, kept, seeds, epochs):
    durations = {Candidate("a"): DURATION, Candidate("a", "fixed"): DURATION, Candidate("a", "adaptive"): DURATION}
    choice = Choice(tuple(durations), (1, 2, 3), 40)
    found = fit(durations, choice, seconds, more_seeds=True)
    assert found == Choice(tuple(durations)[:kept], seeds, epochs)
    assert found.seconds(durations) <= seconds
    with pytest.raises(UserError, match=r"a kd, fixed and what it is compared with take 0.011 hours for 10 epochs"):
        fit(durations, choice, 30.0)
