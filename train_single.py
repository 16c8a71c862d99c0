"""Train one network with cross-entropy: a teacher, or a student on its own. See --help."""

from utils.cli import guarded, main_single

if __name__ == "__main__":
    guarded(main_single)
