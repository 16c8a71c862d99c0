"""What the tests on Slurm share."""

from pathlib import Path

import pytest
from process_runs import prepare


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A folder with images, and a teacher of theirs."""
    return prepare(tmp_path_factory.mktemp("data"))
