"""Train one network with cross-entropy: a teacher, or a student on its own. See --help."""

from utils.cli import main_single
from utils.command import guarded

if __name__ == "__main__":
    guarded(main_single, trains=True)
