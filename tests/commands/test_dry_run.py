"""``--dry-run``: says what a run would do, and does nothing of it."""

import pytest
from made_up_runs import write_run

from utils.cli import main_distill, main_single
from utils.errors import UserError

SMALL = ("dataset.img_h=16", "dataset.img_w=16")


@pytest.fixture
def said(tmp_path, capsys, monkeypatch):
    for name in ("TIMED", "WARM_UP"):
        monkeypatch.setattr(f"utils.training.dry_run.{name}", 1)

    def run(main, *words: str) -> str:
        main(arguments=["--dataset", "digits", *words, *SMALL, f"run.root={tmp_path}", "--dry-run"])
        assert not list(tmp_path.iterdir())
        return capsys.readouterr().out

    return run


def test_a_network_alone(said):
    text = said(main_single, "--model", "resnet8", "training.epochs=30", "training.batch_size=97")
    assert "  batch_size: 97" in text
    assert "network: 78,042 parameters, 6.3 MFLOPs an image, features 16x16x16 16x16x16 32x8x8 64x4x4 64" in text
    assert "train: SGD of model, learning rate 0.05, 78,042 parameters" in text
    assert " ms a step, 8 steps an epoch, 30 epochs" in text
    assert "teacher" not in text.partition("network: ")[2]


def test_a_pair_with_a_teacher_that_is_missing_and_a_phase_of_its_own(said):
    text = said(main_distill, "--net1", "resnet14", "--net2", "resnet8", "--distiller", "ft", "training.batch_size=8")
    assert "the teacher is trained first, " in text
    assert "spots: f3, logits" in text
    assert text.index("pretrain: SGD of ") < text.index("train: SGD of student")
    assert "SGD of agent" in text


def test_a_wrong_run_is_refused_as_the_run_itself_would_be(said, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("utils.training.run.open_data", lambda *_: pytest.fail("data would be downloaded"))
        with pytest.raises(UserError, match="unknown model 'resnet9'"):
            said(main_single, "--model", "resnet9")
    with pytest.raises(UserError, match=r"kd_loss\.name=sp: distiller=sp before sh chooses it, with what goes with it"):
        said(main_distill, "kd_loss.name=sp")


def test_a_run_that_is_there_is_refused_unless_it_goes_on(tmp_path, capsys):
    write_run(tmp_path, selection="single", student="resnet8", seed=1029, dataset="digits")
    words = ["--dataset", "digits", "--model", "resnet8", *SMALL, f"run.root={tmp_path}", "--dry-run"]
    with pytest.raises(UserError, match="holds a finished run already with other settings"):
        main_single(words)
    main_single([*words, "--resume"])
    assert capsys.readouterr().out.count("in all about ") == 2
    with pytest.raises(UserError, match="nothing to resume there"):
        main_single([*words, "--resume", "--seed", "7"])
