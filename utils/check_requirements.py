"""Print what this interpreter lacks of requirements files: packages, or their versions; exit with 1 if there is any.

Run by the launchers before anything is installed, so it uses nothing but the standard library.
"""

import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def lacking(requirements: str) -> list[str]:
    """Lines of `requirements` (``name>=version``) that this interpreter does not meet."""
    lines = [line.split("#")[0].strip() for line in requirements.splitlines()]
    return [line for line in lines if line and not _met(*re.split(r"\s*>=\s*", line))]


def _met(name: str, minimum: str = "0") -> bool:
    try:
        return _numbers(version(name)) >= _numbers(minimum)
    except PackageNotFoundError:
        return False


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text.split("+")[0])]


if __name__ == "__main__":
    missing = [line for file in sys.argv[1:] for line in lacking(Path(file).read_text(encoding="utf-8"))]
    print(", ".join(missing))
    sys.exit(bool(missing))
