"""Which steps are captured."""

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


class TestChoice:
    """`CudaRecorder` touches no GPU before it is used, so all of this can be asked without one."""

    def choose(self, setting, device, task=None):
        lines = []
        return choose_recorder(setting, device, task if task is not None else toy_task(), lines.append), lines

    @pytest.mark.parametrize("setting", ["auto", True])
    def test_is_a_graph_on_a_gpu(self, setting):
        recorder, lines = self.choose(setting, CUDA)
        assert isinstance(recorder, CudaRecorder)
        assert lines == []

    def test_is_no_graph_if_none_is_wanted(self):
        assert self.choose(False, CUDA) == (None, [])

    @pytest.mark.parametrize("setting", ["auto", False])
    def test_is_silently_no_graph_on_a_cpu(self, setting):
        assert self.choose(setting, CPU) == (None, [])

    @pytest.mark.parametrize(
        ("device", "world", "allocator", "capturable", "reason"),
        [
            (CPU, 1, "native", True, "this is the cpu"),
            (CUDA, 4, "native", True, "there are 4 processes"),
            (CUDA, 1, "cudaMallocAsync", True, "PYTORCH_CUDA_ALLOC_CONF asks for cudaMallocAsync, .*"),
            (CUDA, 1, "native", False, "Refuses has capturable = False"),
        ],
    )
    def test_is_explained_in_one_line_where_there_can_be_no_graph(
        self, monkeypatch, device, world, allocator, capturable, reason
    ):
        class Refuses(AT):
            pass

        Refuses.capturable = capturable
        monkeypatch.setattr("utils.training.cuda_graph.world_size", lambda: world)
        monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: allocator)
        task = toy_task(Refuses)
        with pytest.raises(UserError, match=f"^training.cuda_graph: true, but {reason}; auto makes a graph where it"):
            self.choose(True, device, task)
        recorder, lines = self.choose("auto", device, task)
        assert recorder is None
        assert len(lines) == (device != CPU)
        assert all(re.fullmatch(f"steps run eagerly, not as one CUDA graph: {reason}", line) for line in lines)
        assert self.choose(False, device, task) == (None, [])
