"""Train a student that is distilled where the policy says not to (anti-SAKD). See --help."""

from functools import partial

from utils.cli import main_distill
from utils.command import guarded

if __name__ == "__main__":
    guarded(partial(main_distill, "anti"), trains=True)
