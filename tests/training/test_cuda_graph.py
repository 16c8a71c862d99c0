"""Which steps are captured, and what a recorder asks of CUDA."""

from __future__ import annotations

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

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
        return choose_recorder(setting, device, [task if task is not None else toy_task()], lines.append), lines

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
        ("device", "world", "capturable", "reason"),
        [
            (CPU, 1, True, "this is the cpu"),
            (CUDA, 4, True, "there are 4 processes"),
            (CUDA, 1, False, "Refuses has capturable = False"),
        ],
    )
    def test_is_explained_in_one_line_where_there_can_be_no_graph(self, monkeypatch, device, world, capturable, reason):
        class Refuses(AT):
            pass

        Refuses.capturable = capturable
        monkeypatch.setattr("utils.training.cuda_graph.world_size", lambda: world)
        task = toy_task(Refuses)
        with pytest.raises(UserError) as caught:
            self.choose(True, device, task)
        assert str(caught.value) == f"training.cuda_graph: true, but {reason}; auto makes a graph where it can"
        expected = [] if device == CPU else [f"steps run eagerly, not as one CUDA graph: {reason}"]
        assert self.choose("auto", device, task) == (None, expected)
        assert self.choose(False, device, task) == (None, [])


class FakeCuda:
    """As much of `torch.cuda` as a recorder uses; what it did, in order."""

    def __init__(self, monkeypatch, broken=False):
        self.events, self.mode, self.broken = [], 0, broken
        self.generator = SimpleNamespace(clone_state=lambda: "copy", graphsafe_set_state=self.events.append)
        stream = SimpleNamespace(wait_stream=lambda other: self.events.append("wait"))
        fakes = {
            "Stream": lambda device: stream,
            "current_stream": lambda device: stream,
            "current_device": lambda: 0,
            "stream": lambda stream: nullcontext(),
            "CUDAGraph": lambda: SimpleNamespace(replay=lambda: self.events.append("replay")),
            "graph": self.graph,
            "graph_pool_handle": lambda: "pool",
            "default_generators": [self.generator],
            "get_sync_debug_mode": lambda: self.mode,
            "set_sync_debug_mode": lambda mode: setattr(self, "mode", mode),
        }
        for name, fake in fakes.items():
            assert hasattr(torch.cuda, name)
            monkeypatch.setattr(torch.cuda, name, fake)
        end = lambda device, pool: self.events.append(f"end {pool}")  # noqa: E731
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)

    @contextmanager
    def graph(self, graph, pool, capture_error_mode):
        self.events.append(f"capture {capture_error_mode}")
        try:
            yield
        finally:
            if self.broken:
                raise RuntimeError("operation failed due to a previous error during capture")


class TestRecorder:
    """The order of what a real recorder asks of CUDA; only a GPU can show that it works."""

    def test_rehearses_where_waiting_is_an_error_and_then_captures(self, monkeypatch):
        cuda = FakeCuda(monkeypatch)
        repeat = CudaRecorder(CUDA).record(lambda: cuda.events.append(cuda.mode))
        repeat()
        assert cuda.events == ["wait", "error", "error", "error", "wait", "capture thread_local", 0, "replay"]

    def test_leaves_no_mode_and_no_stream_behind_if_a_rehearsal_fails(self, monkeypatch):
        cuda = FakeCuda(monkeypatch)
        with pytest.raises(ZeroDivisionError):
            CudaRecorder(CUDA).record(lambda: 1 / 0)
        assert cuda.events == ["wait", "wait"]
        assert cuda.mode == 0

    def test_says_what_broke_a_capture_and_cleans_up(self, monkeypatch):
        cuda = FakeCuda(monkeypatch, broken=True)

        def step():
            if "capture thread_local" in cuda.events:
                raise ValueError("the cause")

        with pytest.raises(ValueError, match="the cause"):
            CudaRecorder(CUDA).record(step)
        assert cuda.events[-2:] == ["end pool", "copy"]
