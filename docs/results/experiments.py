"""What was run for docs/results.md: folders, teachers, and how pages and figures call them."""

from __future__ import annotations

from result_lines import Lines, last

from utils.run_folder.read import SINGLE

# The folders of the runs (``run.root``), and how the teacher of each was trained.
MANY, BY_HEART = "50,000 images", "5,000, by heart"
TEACHERS = {"run/all": MANY, "run/long": BY_HEART}
CHOICES = TEACHERS | {"run/young-20": "5,000, 20 epochs", "run/young-5": "5,000, 5 epochs"}
UNDECIDED = "-apart"  # behind these: homo is false
DASHES = {"": "-", UNDECIDED: "--"}  # of lines in figures
WHOLE = "run/whole-apart"  # BY_HEART, a student of 240 epochs
DIGITS = "run/digits-8"
DISTILLERS = {"at": "AT", "sp": "SP", "crd": "CRD"}
SELECTIONS = ("fixed", "random", "anti", "adaptive")


def alone(lines: Lines) -> dict[int, float]:
    """The accuracy of the student alone by seed."""
    return last(lines, root="run", dataset="cifar-10-mini", student="resnet8", selection=SINGLE)
