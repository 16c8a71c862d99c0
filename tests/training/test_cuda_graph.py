"""Which steps are captured. `CudaRecorder` touches no GPU before it is used, so this can be asked without one."""

from __future__ import annotations

import re

import pytest
import torch
from toys import toy_task

from distillers.at import AT
from utils.errors import UserError
from utils.training.cuda_graph import CudaRecorder, choose_recorder

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


def choose(setting, device, task):
    lines = []
    return choose_recorder(setting, device, task, lines.append), lines


def test_steps_are_captured_on_a_gpu_unless_the_config_says_otherwise():
    for setting in ("auto", True, False):
        recorder, lines = choose(setting, CUDA, toy_task())
        assert (isinstance(recorder, CudaRecorder), lines) == (bool(setting), [])


@pytest.mark.parametrize(
    ("device", "world", "allocator", "capturable", "reason"),
    [
        (CPU, 1, "native", True, "this is the cpu"),
        (CUDA, 4, "native", True, "there are 4 processes"),
        (CUDA, 1, "cudaMallocAsync", True, "PYTORCH_CUDA_ALLOC_CONF asks for cudaMallocAsync, .*"),
        (CUDA, 1, "native", False, "Refuses has capturable = False"),
    ],
)
def test_where_there_can_be_no_graph_is_one_line_and_on_a_cpu_none(
    monkeypatch, device, world, allocator, capturable, reason
):
    class Refuses(AT):
        pass

    Refuses.capturable = capturable
    monkeypatch.setattr("utils.training.cuda_graph.world_size", lambda: world)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
    task = toy_task(Refuses)
    with pytest.raises(UserError, match=f"^training.cuda_graph: true, but {reason}; auto makes a graph where it"):
        choose(True, device, task)
    recorder, lines = choose("auto", device, task)
    assert recorder is None
    assert len(lines) == (device != CPU)
    assert all(re.fullmatch(f"steps run eagerly, not as one CUDA graph: {reason}", line) for line in lines)
    assert choose(False, device, task) == (None, [])
