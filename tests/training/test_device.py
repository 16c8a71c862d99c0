"""Freed memory is kept for the next step."""

import os
import resource
import sys

import pytest
import torch
from ready_process import ReadyProcess

from utils.training.device import keep_freed_memory


def count_new_pages(variables):
    """Whether memory is kept, and pages that the system had to find for a tensor as large as those freed before."""
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        del os.environ[name]
    os.environ.update(variables)
    kept = keep_freed_memory(torch.device("cpu"))
    for _ in range(4):
        torch.ones(2**24)  # 64 MiB, more than glibc would keep
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)


def new_pages(**variables):
    process = ReadyProcess(count_new_pages, variables)  # its own, for what is kept cannot be given up
    assert process.ending() == (0, "")
    kept, pages = process.stdout.read().split()
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
