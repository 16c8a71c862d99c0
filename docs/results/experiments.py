"""What was run for docs/results.md: folders, teachers, and how pages and figures call them."""

from __future__ import annotations

from result_lines import Lines, last

from utils.run_folder.read import SINGLE

# The folders of the runs (``run.root``), the network of each teacher, and how it was trained; the student is resnet8.
MANY, BY_HEART = "resnet20, 50,000 images", "resnet20, 5,000 by heart"
OTHER_FAMILY, OTHER_BY_HEART = "wrn_16_2, 50,000 images", "wrn_16_2, 5,000 by heart"
WIDE = {"run/wide": OTHER_FAMILY, "run/wide-long": OTHER_BY_HEART}  # homo is false without a word
TEACHERS = {"run/all": MANY, "run/long": BY_HEART} | WIDE
CHOICES = TEACHERS | {"run/young-20": "resnet20, 5,000, 20 epochs", "run/young-5": "resnet20, 5,000, 5 epochs"}

# What these folders' names end in, where a setting is another one.
UNDECIDED = "-apart"  # kd_loss.homo is false
QUARTER = "-quarter"  # kd.routing_share is 1/4
WARM = "-warm"  # kd.warmup_epochs is 5
GAMMA = "-gamma-1"  # kd.loss_weights.classify_weight is 1
DASHES = {"": "-", UNDECIDED: "--"}  # of lines in figures

WHOLE = "run/whole"  # BY_HEART, students of 240 epochs
LARGE = "run/pixels-32"  # teacher and students as in run/all, on images of 32 x 32 pixels
DIGITS = "run/digits-8"
DISTILLERS = {"at": "AT", "sp": "SP", "crd": "CRD"}
ALL_DISTILLERS = {"kd": "KD"} | DISTILLERS | {"dkd": "DKD", "dist": "DIST", "reviewkd": "ReviewKD"}
SELECTIONS = ("fixed", "random", "anti", "adaptive")


def alone(lines: Lines, root: str = "run") -> dict[int, float]:
    """The accuracy of the student alone by seed."""
    return last(lines, root=root, dataset="cifar-10-mini", student="resnet8", selection=SINGLE)
