"""Train a student by spot-adaptive knowledge distillation. See --help."""

from utils.cli import guarded, main_distill

if __name__ == "__main__":
    guarded(main_distill)
