"""Freed memory is kept for the next step."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from utils.training.device import keep_freed_memory
kept = keep_freed_memory(torch.device("cpu"))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    torch.ones(2**24)  # 64 MiB, more than glibc would keep
before = faults()
torch.ones(2**24)
print(kept, faults() - before)
"""


def new_pages(**environment):
    """Whether memory is kept, and pages that the system had to find for a tensor as large as those freed before."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment
    command = [sys.executable, "-c", SCRIPT]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    kept, pages = run.stdout.split()
    return kept == "True", int(pages)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_tensor_takes_the_place_of_the_one_before():
    kept, pages = new_pages()
    assert kept
    assert pages < 1000


def test_who_has_chosen_otherwise_is_not_overruled():
    kept, pages = new_pages(MALLOC_TRIM_THRESHOLD_="131072")
    assert not kept
    assert pages > 1000
