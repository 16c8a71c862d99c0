"""Train a student by spot-adaptive knowledge distillation. See --help."""

from utils.cli import main_distill
from utils.command import guarded

if __name__ == "__main__":
    guarded(main_distill, trains=True)
