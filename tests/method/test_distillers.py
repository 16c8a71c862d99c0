"""What each distiller does besides its loss; test_every_distiller.py has what all have in common."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from distiller_inputs import (
    BATCH,
    DEEPER,
    MAPS_ONLY,
    STUDENT,
    WIDER,
    build,
    make_inputs,
    random_features,
    setting,
)
from refusals import refusal
from toy_runs import toy_config
from toys import ToyNet, take_step, toy_batch, toy_task

from distillers.base import Spot, resolve_spots
from models.pooling import average_pool, pool_windows
from utils.training.build import make_phases


class TestSpots:
    def test_may_count_from_the_end(self):
        assert resolve_spots([(-3, -4), (-1, -1)], setting(teacher=DEEPER)) == [Spot(2, 2), Spot(4, 5)]
        assert build("ft", teacher=DEEPER).spots == [Spot(3, 4)]

    @pytest.mark.parametrize(
        ("spots", "message"),
        [
            ([(5, 4)], r"\[5, 4\]: the student of big-small has features 0 to 4"),
            ([(4, -6)], r"\[4, -6\]: the teacher of big-small has features 0 to 4"),
            ([(3, 4)], r"a 12x4x4 map \(student\) and a vector of 20 \(teacher\) there; the distiller takes two maps$"),
            ([(2, 2), (1, 3)], r"\[1, 3\] after \[2, 2\]; both indices must grow"),
            ([(1, 2), (2, 2)], r"\[2, 2\] after \[1, 2\]; both indices must grow"),
            ([], "AT needs one or more"),
        ],
    )
    def test_that_cannot_be_are_refused_in_one_line(self, spots, message):
        refused(message, "at", spots=spots)

    @pytest.mark.parametrize("name", MAPS_ONLY)
    def test_must_be_maps_where_positions_are_compared(self, name):
        refused("has a vector of 12 .*; the distiller takes two maps$", name, spots=[(-1, -1)])


def refused(message: str, name: str, *args, **changes) -> None:
    assert re.search(message, refusal(build, name, *args, **changes))


def test_what_distils_the_logits_alone_has_no_spots_to_choose():
    refused("DKD distils the logits alone", "dkd", spots=[(1, 1)])


def test_a_distiller_that_finds_no_spot_in_the_networks_is_refused_and_kd_named():
    expected = (
        r"AT finds no spot in big-small \(1 student and 2 teacher features\); "
        "kd_loss.spots=.* chooses some, distiller=kd distils the logits alone"
    )
    refused(expected, "at", student=[(12,)], teacher=[(20,), (20,)])


def test_vid_starts_from_the_variance_it_is_given():
    distiller = build("vid", options={"variance": 0.1})
    for rho, channels in zip(distiller.rhos, (10, 16, 20)):
        torch.testing.assert_close(F.softplus(rho) + 1e-5, torch.full((channels,), 0.1))


def test_reviewkd_fuses_in_at_most_512_channels():
    assert build("reviewkd", [*STUDENT[:-1], (600,)]).fusions[-1].enter[0].out_channels == 512


def test_ft_trains_the_paraphraser_alone_beforehand_to_give_back_what_it_is_given():
    distiller, teacher = build("ft"), random_features(WIDER)
    paraphraser, main = set(distiller.pretraining_parameters(None)), set(distiller.main_parameters())
    assert paraphraser | main == set(distiller.parameters())
    assert not paraphraser & main
    loss = distiller.pretraining_loss([], teacher)
    torch.testing.assert_close(loss, F.mse_loss(distiller.paraphrasers[0](teacher[3]), teacher[3]))


@pytest.mark.parametrize(("name", "trained"), [("ft", "distiller.paraphrasers."), ("fsp", "student.")])
def test_a_step_of_pretraining_moves_its_own_alone(name, trained):
    task = toy_task(name)
    before = {key: value.clone() for key, value in task.state_dict().items()}
    phase, _ = make_phases(task, toy_config())
    take_step(phase.task.train(), toy_batch(40))
    phase.optimizers["pretrain"].optimizer.step()
    moved = {key for key, value in task.state_dict().items() if not torch.equal(value, before[key])}
    # The classifier comes after the last flow.
    assert moved == {key for key in before if key.startswith(trained)} - {"student.fc.weight", "student.fc.bias"}


class TestFSP:
    def test_names_pair_spot_and_widths_that_do_not_fit(self):
        refused(r"fsp: big-small, spot \[1, 1\]: student 6→6 channels, teacher 6→10; ", "fsp", STUDENT, WIDER)

    @pytest.mark.parametrize("spot", [(1, 0), (-5, 1)])
    def test_needs_a_feature_before_the_spot(self, spot):
        refused("needs a feature before the spot", "fsp", spots=[spot])

    def test_compares_the_flows_into_both_indices_of_a_spot(self):
        longer = [STUDENT[0], *STUDENT]  # the flow into the teacher's feature k + 1 is that into the student's k
        distiller = build("fsp", STUDENT, longer, spots=[(1, 2), (3, 4)])
        features = [x.detach() for x in random_features(STUDENT)]
        losses = distiller(features, [features[0], *features], torch.ones(BATCH, 2), None)
        assert losses.tolist() == [0, 0]

    def test_pretrains_on_all_samples(self):
        features, teacher, gates, batch = make_inputs("fsp")
        distiller = build("fsp")
        torch.testing.assert_close(
            distiller.pretraining_loss(features, teacher), distiller(features, teacher, gates, batch).sum()
        )

    def test_pretrains_the_students_stages_up_to_the_last_spot(self):
        net = ToyNet()
        shapes = net.feature_shapes(8, 8)
        trained = build("fsp", shapes, spots=[(1, 1)]).pretraining_parameters(net)
        stem = [*net.conv1.parameters(), *net.bn1.parameters(), *net.conv2.parameters(), *net.bn2.parameters()]
        assert list(map(id, trained)) == list(map(id, stem))
        all_of_it = build("fsp", shapes).pretraining_parameters(net)
        assert {id(p) for p in net.parameters()} - {id(p) for p in all_of_it} == {id(p) for p in net.fc.parameters()}


@pytest.mark.parametrize("size", [(4, 4), (2, 8), (3, 5), (6, 7), (8, 8), (1, 1)])
def test_pooling_has_the_values_and_gradients_of_adaptive_average_pooling_in_all_ways(size):
    feature = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, *size, dtype=torch.float64)
    expected, *others = (
        [pooled, *torch.autograd.grad((pooled * weight).sum(), feature)]
        for pooled in (F.adaptive_avg_pool2d(feature, size), average_pool(feature, *size), pool_windows(feature, *size))
    )
    for found in others:
        torch.testing.assert_close(found, expected)
