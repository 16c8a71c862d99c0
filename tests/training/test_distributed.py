"""Training on two real processes: true gradients, equal copies, and what one process would have found.

Functions without `test_` run on either process, see process_pair.py; test_jobs.py has what the launcher does.
"""

import functools
import os
import signal
import time

import numpy as np
import pytest
import torch
import toy_runs
from process_pair import places_of_two, process_pair
from ready_process import ReadyProcess
from torch import nn
from toy_runs import (
    RECIPE,
    STEPS,
    assert_equal,
    assert_same,
    at_step,
    break_off,
    finish,
    gate_records,
    records,
    toy_config,
)
from toys import NUM_CLASSES, NUM_SAMPLES, ToyNet, toy_batch, toy_data, toy_task

from datasets.batch import Batch
from distillers.crd import Contrast
from distillers.task import Pretraining
from utils.command import guarded
from utils.errors import CONNECTION_LOST, UserError
from utils.processes.group import (
    Replica,
    barrier,
    from_main,
    gather_objects,
    gather_rows,
    is_main,
    main_first,
    process_group,
    rank,
    world_size,
)
from utils.processes.stopping import EXIT_INTERRUPTED, Interrupted
from utils.run_folder.checkpoint import read_checkpoint
from utils.run_folder.folder import RunDir
from utils.training.build import synchronize_batchnorm
from utils.training.engine import evaluate
from utils.training.gate_counts import GateRecorder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def on_both():
    """Call a function of this module on two processes; the list of both results."""
    with process_pair() as pair:
        yield pair


# ---- messages


def introduce(folder):
    return rank(), world_size(), is_main(), gather_objects(rank()), from_main(f"of {rank()}")


def join_rows(folder):
    index = torch.arange(3 - rank()) + 10 * rank()
    index, rows = gather_rows(index, index[:, None] * torch.ones(2))
    return index.tolist(), rows.tolist()


def begin(folder):
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, rank())
    Replica(layer, layer.parameters())
    return layer.weight.item()


def go_first(folder):
    with main_first():
        if (folder / "file").exists():
            return "found"
        time.sleep(0.2)
        (folder / "file").touch()
        return "wrote"


JOINED = [0, 1, 2, 10, 11], [[float(k)] * 2 for k in (0, 1, 2, 10, 11)]


@pytest.mark.parametrize(
    ("function", "answers"),
    [
        (introduce, [(0, 2, True, [0, 1], "of 0"), (1, 2, False, [0, 1], "of 0")]),
        (join_rows, [JOINED] * 2),  # of unequal numbers
        (begin, [0.0, 0.0]),  # with the weights of the first process
        (go_first, ["wrote", "found"]),
    ],
)
def test_processes_tell_each_other(on_both, tmp_path, function, answers):
    assert on_both(function, tmp_path) == answers


def test_a_process_alone_talks_to_itself(tmp_path):
    assert introduce(tmp_path) == (0, 1, True, [0], "of 0")


def die_or_wait():
    with process_group(CPU):
        barrier()
        if rank():
            os.kill(os.getpid(), signal.SIGKILL)
        guarded(barrier)


def test_that_the_other_process_died_is_a_lost_connection():
    first, _ = [ReadyProcess(die_or_wait, environment=place) for place in places_of_two()]
    assert first.ending() == (EXIT_INTERRUPTED, f"error: {CONNECTION_LOST}\n")


# ---- gradients


def make_task(distiller, selection, phase):
    task = toy_task(distiller, selection=selection)
    if distiller == "crd":
        for contrast in task.distiller.contrasts:  # that two processes find Z together is another test's business
            contrast.student_bank.normalizer.fill_(30.0)
            contrast.teacher_bank.normalizer.fill_(40.0)
    if phase == "pretrain":
        task = Pretraining(task.student, task.teacher, task.distiller).train()
    return task.double(), [parameter for group in task.parameter_groups().values() for parameter in group]


def gradients_on_part(number, task, trained, batch, replica=None):
    torch.manual_seed(100 + number)  # the gates' noise
    for output in task(Batch(*(part[number::2] for part in batch))):
        output.loss.backward()
        if replica:
            replica.send_gradients()
    if replica:
        replica.receive_gradients()
    wanted = {id(parameter) for parameter in trained}
    return {name: p.grad.clone() for name, p in task.named_parameters() if id(p) in wanted}


def gradients(distiller, selection, phase, size):
    """Those that two processes find together, and the mean of those that one finds on either part."""
    batch = toy_batch(size)
    batch = batch._replace(image=batch.image.double())
    task, trained = make_task(distiller, selection, phase)
    together = gradients_on_part(rank(), task, trained, batch, Replica(task, trained))
    apart = [gradients_on_part(k, *make_task(distiller, selection, phase), batch) for k in range(2)]
    return together, {name: (apart[0][name] + apart[1][name]) / 2 for name in apart[0]}


@pytest.mark.parametrize(
    ("distiller", "selection", "phase", "size"),
    [
        ("at", "adaptive", "train", 8),
        ("fitnet", "random", "train", 7),  # unequal parts
        ("crd", "adaptive", "train", 8),
        ("ft", "adaptive", "pretrain", 8),
        ("fsp", "fixed", "train", 8),
    ],
)
def test_gradients_are_the_average_of_those_of_the_two_parts(on_both, distiller, selection, phase, size):
    (found, expected), (found_too, _) = on_both(gradients, distiller, selection, phase, size)
    assert_equal(found_too, found)
    assert expected
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-12 * largest)


# ---- what one process would have found


def accuracy():
    torch.manual_seed(0)
    data = toy_data(batch_size=7, shard=(rank(), world_size()))
    return evaluate(ToyNet(), data.val, CPU)


def gate_counts():
    """Two epochs of known gates, collected within the second; other gates at every visit of a sample."""
    recorder = GateRecorder(["f1", "logits"], NUM_CLASSES, NUM_SAMPLES, CPU)
    loader = toy_data(shard=(rank(), world_size())).train
    for epoch in range(2):
        recorder.reset()
        for step, batch in enumerate(loader.epoch(epoch)):
            recorder.add(torch.stack([batch.index % 3 == epoch, batch.index % 2 == epoch], dim=1).float(), batch)
            if epoch == 1 and step == 2:
                recorder.collect()
        recorder.collect()
    return recorder.shares(), recorder.sample_chosen


def banks_and_normalisers():
    """After two batches of seven, which two processes share unequally."""
    torch.manual_seed(0)
    contrast = Contrast((5,), (7,), samples=NUM_SAMPLES, width=8, temperature=0.07, momentum=0.5)
    contrast.train()
    for _ in range(2):
        student, teacher = torch.randn(7, 5), torch.randn(7, 7)
        gate = torch.tensor([1.0, 0, 1, 1, 0, 1, 1])
        index = torch.randperm(NUM_SAMPLES)[:7]
        candidates = torch.cat([index[:, None], torch.randint(NUM_SAMPLES, (7, 12))], dim=1)
        mine = slice(rank(), None, world_size())
        contrast(student[mine], teacher[mine], gate[mine], candidates[mine])
    return [(bank.rows, bank.normalizer) for bank in (contrast.student_bank, contrast.teacher_bank)]


@pytest.mark.parametrize(
    ("function", "processes", "tolerance"),
    [
        (accuracy, 2, {"rtol": 1e-6, "atol": 1e-12}),
        (gate_counts, 1, {"rtol": 0, "atol": 0}),  # only the first one writes them
        (banks_and_normalisers, 2, {}),
    ],
)
def test_two_processes_find_what_one_finds(on_both, function, processes, tolerance):
    alone = function()
    for together in on_both(function)[:processes]:
        torch.testing.assert_close(together, alone, **tolerance)


# ---- whole runs


def make_engine(folder, distiller, resume=False):
    keys = {"epochs": 2, "lr_decay_epochs": [1], "save_every_steps": 2}
    config = toy_config(**keys | (RECIPE if distiller == "at" else {}))
    return toy_runs.make_engine(folder, distiller, "adaptive", resume, config)


def train(folder, distiller, resume=False):
    engine = make_engine(folder, distiller, resume)
    finish(engine)
    assert engine._agreed._asked is None, "a message that is under way may crash a process that exits"
    return engine.task.state_dict(), torch.get_rng_state()


def train_until_the_power_fails(folder, distiller, saves):
    engine = make_engine(folder, distiller)
    break_off(engine, saves)


def train_until_a_signal(folder):
    engine = make_engine(folder, "at")
    if rank() == 1:
        at_step(engine, STEPS + 3, after=lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted) as caught:
        finish(engine)
    return str(caught.value)


@pytest.fixture(scope="module")
def whole(on_both, tmp_path_factory):
    """A run that nothing interrupts: its folder, and what `train` gives on each process; made once for every kind."""

    @functools.cache
    def get(distiller):
        folder = tmp_path_factory.mktemp("whole") / "run"
        return RunDir(folder), on_both(train, folder, distiller)

    return get


def progress(run):
    return read_checkpoint(run.last)["progress"]


@pytest.mark.parametrize("distiller", [None, "crd", "fsp"])
def test_a_run_leaves_equal_copies_and_one_set_of_files(whole, distiller):
    run, ((state, random_state), (other_state, other_random_state)) = whole(distiller)
    assert_equal(other_state, state)
    assert not torch.equal(random_state, other_random_state)
    epochs = [record for record in records(run) if record["phase"] == "train"]
    assert [record["epoch"] for record in epochs] == [1, 2]
    if distiller is not None:
        assert [line["global_epoch"] for line in gate_records(run)] == [record["global_epoch"] for record in epochs]
    assert len(run.event_files()) == 1
    assert run.log.read_text().count(" train 2/2 | loss") == 1
    if distiller == "crd":
        name = "distiller.contrasts.0.student_bank.rows"
        moved = state[name] != toy_task("crd", seed=1029).state_dict()[name]
        assert moved.any(dim=1).float().mean() > 0.5


@pytest.mark.parametrize(("distiller", "saves"), [("crd", 3), ("fsp", 5)])
def test_a_resumed_run_ends_as_if_never_interrupted(on_both, whole, tmp_path, distiller, saves):
    on_both(train_until_the_power_fails, tmp_path, distiller, saves)
    on_both(train, tmp_path, distiller, True)
    assert_same(RunDir(tmp_path), whole(distiller)[0])


def test_a_signal_to_one_process_stops_all_at_the_same_step(on_both, whole, tmp_path):
    first, second = on_both(train_until_a_signal, tmp_path)
    assert first == second
    assert "stopped in train 2/2 after step 4/5, all saved" in first  # asked for in the third
    assert progress(RunDir(tmp_path)) == {"phase": 0, "epoch": 1, "step": 4}
    on_both(train, tmp_path, "at", True)
    assert_same(RunDir(tmp_path), whole("at")[0])


@pytest.mark.parametrize(("then", "now"), [(1, 2), (2, 1)])
def test_a_resumed_run_may_have_another_number_of_processes(on_both, tmp_path, then, now):
    """The epoch under way still counts every sample once, and a line names the difference."""
    call = {1: lambda function, *arguments: function(*arguments), 2: on_both}
    call[then](train_until_the_power_fails, tmp_path, "at", 2)
    run = RunDir(tmp_path)
    assert progress(run) == {"phase": 0, "epoch": 0, "step": 4}
    call[now](train, tmp_path, "at", True)
    assert [record["epoch"] for record in records(run)] == [1, 2]
    first, gates = records(run)[0]["train"], gate_records(run)[0]
    shares = np.array(gates["classes"]).mean(axis=0)
    assert [first[f"gate/{name}"] for name in gates["gates"]] == pytest.approx(shares, abs=1e-3)
    hits = first["top1"] * NUM_SAMPLES / 100
    assert hits == pytest.approx(round(hits), abs=1e-4)
    assert f"resumed on {now} instead of {then} processes" in run.log.read_text()


# ---- GPUs


def test_synchronized_batchnorm_needs_several_gpus():
    with pytest.raises(UserError, match=r"training.sync_bn: needs GPUs, .* this is the cpu"):
        synchronize_batchnorm(toy_task(), toy_config(sync_bn=True), CPU)
    task = synchronize_batchnorm(toy_task(), toy_config(sync_bn=True), torch.device("cuda"))
    assert not any(isinstance(layer, nn.SyncBatchNorm) for layer in task.modules())


def test_synchronized_batchnorm_keeps_every_tensor_and_the_frozen_twin(on_both):
    assert on_both(convert) == [(True, True, True)] * 2


def convert():
    """Are the layers converted, is every tensor still the same one, and does the twin share the student's?"""
    task = synchronize_batchnorm(toy_task("fitnet"), toy_config(), CPU)  # not asked for
    before = {name: id(tensor) for name, tensor in task.state_dict(keep_vars=True).items()}
    task = synchronize_batchnorm(task, toy_config(sync_bn=True), torch.device("cuda"))
    after = {name: id(tensor) for name, tensor in task.state_dict(keep_vars=True).items()}
    with torch.no_grad():
        task.student.bn1.weight.fill_(3.0)
        task.student.bn1.running_mean.fill_(5.0)
    twin = task._twin[0].bn1
    shared = bool((twin.weight == 3).all() and (twin.running_mean == 5).all())
    return all(isinstance(x, nn.SyncBatchNorm) for x in (task.student.bn1, task.student.bn3)), before == after, shared
