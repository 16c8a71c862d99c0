"""What all distillers have in common, and what each does besides its loss."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from toys import ToyNet, toy_batch

from datasets.batch import Batch
from distillers import DISTILLERS
from distillers.base import Setting, Spot, all_middle, resolve_spots
from distillers.ops.features import average_pool
from distillers.ops.precision import at_least
from models.pooling import pool_windows
from utils.errors import UserError

BATCH = 6
NUM_SAMPLES = 40
STUDENT = [(6, 16, 16), (6, 16, 16), (8, 8, 8), (12, 4, 4), (12,)]
WIDER = [(6, 16, 16), (10, 16, 16), (16, 8, 8), (20, 4, 4), (20,)]
LARGER_MAPS = [(6, 32, 32), (6, 32, 32), (8, 16, 16), (12, 8, 8), (12,)]
SMALLER_MAPS = [(6, 8, 8), (6, 8, 8), (8, 4, 4), (12, 2, 2), (12,)]
ODD_MAPS = [(6, 14, 14), (6, 14, 14), (8, 7, 7), (12, 3, 3), (12,)]
DEEPER = [(6, 16, 16), (6, 16, 16), (8, 8, 8), (12, 4, 4), (12, 2, 2), (20,)]

WITH_SPOTS = ["at", "fitnet", "sp", "rkd", "cc", "vid", "pkt", "ft", "fsp", "nst", "crd", "reviewkd"]
LOGITS_ONLY = ["kd", "dkd", "dist"]
MAPS_ONLY = ["at", "vid", "ft", "fsp", "nst"]
ADDED = [name for name in DISTILLERS if name not in LOGITS_ONLY + WITH_SPOTS]  # by whoever puts a file in distillers/
SPOTTED = WITH_SPOTS + [name for name in ADDED if not DISTILLERS.get(name).logits_only]
NAMES = LOGITS_ONLY + WITH_SPOTS + ADDED
every_distiller = pytest.mark.parametrize("name", NAMES)
every_spotted = pytest.mark.parametrize("name", SPOTTED)
GATES = {
    "all": torch.ones(BATCH),
    "some": torch.tensor([1.0, 0, 1, 1, 0, 0]),
    "one": torch.tensor([0.0, 0, 0, 1, 0, 0]),
    "none": torch.zeros(BATCH),
}


def setting(name: str = "at", student=STUDENT, teacher=None, **changes) -> Setting:
    """By default of two networks that differ in width, or, for FSP, that do not."""
    teacher = teacher or (student if name == "fsp" else WIDER)
    changes = {"labels": torch.arange(NUM_SAMPLES) % 4, "feat_dim": 8, "pair": "big-small"} | changes
    return Setting(student, teacher, **changes)


def build(name: str, *args, seed: int = 0, options=None, **changes):
    torch.manual_seed(seed)
    return DISTILLERS.get(name)(setting(name, *args, **changes), **(options or {}))


def random_features(shapes, seed: int = 0, size: int = BATCH) -> list[torch.Tensor]:
    """Not negative, as after a ReLU."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(size, *shape, generator=generator) for shape in shapes]


def make_inputs(name: str, student=STUDENT, teacher=None, *, gate=GATES["all"], spots=None):
    """Arguments of a distiller's forward; the student's features want gradients, every spot has the same gate."""
    chosen = setting(name, student, teacher)
    features = [x.requires_grad_() for x in random_features(chosen.student, seed=1)]
    index = torch.arange(BATCH) * 3
    batch = Batch(torch.zeros(BATCH, 3, 1, 1), chosen.labels[index], index)
    gates = gate[:, None].expand(-1, len(build(name, student, teacher, spots=spots).spots))
    return features, random_features(chosen.teacher, seed=2), gates, batch


def gradients(module: nn.Module, features) -> list[torch.Tensor]:
    return [x.grad for x in (*features, *module.parameters()) if x.grad is not None]


def test_the_fifteen_are_registered():
    ours = {*LOGITS_ONLY, *WITH_SPOTS}
    assert len(ours) == 15
    assert ours <= set(DISTILLERS)


def test_published_weights_are_the_defaults():
    weights = {name: DISTILLERS.get(name).default_weight for name in WITH_SPOTS}
    assert weights == {
        "fitnet": 1, "at": 1000, "sp": 3000, "cc": 0.02, "vid": 1, "rkd": 1, "pkt": 30000,
        "ft": 200, "fsp": 50, "nst": 50, "crd": 0.8, "reviewkd": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "same_depth", "deeper_teacher"),
    [
        *((name, [], []) for name in LOGITS_ONLY),
        ("reviewkd", [(1, 1), (2, 2), (3, 3), (4, 4)], [(1, 1), (2, 2), (3, 3), (4, 5)]),
        ("fitnet", [(2, 2)], [(2, 2)]),
        *((name, [(1, 1), (2, 2), (3, 3)], [(1, 1), (2, 2), (3, 3)]) for name in ("at", "vid", "nst", "fsp")),
        *((name, [(3, 3)], [(3, 4)]) for name in ("sp", "ft")),
        *((name, [(4, 4)], [(4, 5)]) for name in ("cc", "rkd", "pkt", "crd")),
    ],
)
def test_published_spots_are_the_defaults(name, same_depth, deeper_teacher):
    assert build(name).spots == same_depth
    assert build(name, STUDENT, DEEPER).spots == deeper_teacher


class TestEveryDistiller:
    @every_distiller
    @pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
    def test_gives_one_finite_float32_loss_per_spot(self, name, gate):
        distiller = build(name)
        losses = distiller(*make_inputs(name, gate=gate))
        assert losses.shape == (len(distiller.spots),)
        assert losses.dtype == torch.float32
        assert losses.isfinite().all()

    @every_spotted
    def test_costs_nothing_and_moves_nothing_when_no_sample_is_chosen(self, name):
        distiller = build(name)
        features, *rest = make_inputs(name, gate=GATES["none"])
        losses = distiller(features, *rest)
        losses.sum().backward()
        assert not losses.any()
        found = gradients(distiller, features)
        assert found
        assert not any(gradient.any() for gradient in found)

    # CRD draws its negatives per batch: test_crd compares it with the negatives held fixed.
    @pytest.mark.parametrize("name", [name for name in SPOTTED if name != "crd"])
    @pytest.mark.parametrize("gate", ["all", "some", "one"])
    def test_equals_the_plain_loss_of_the_chosen_samples_times_their_share(self, name, gate):
        distiller = build(name).double().eval()  # in training, BatchNorm sees the samples that are not chosen
        chosen, share = GATES[gate] > 0, GATES[gate].double().mean()
        features, teacher, gates, batch = make_inputs(name, gate=GATES[gate])
        features = [x.detach().double().requires_grad_() for x in features]
        gathered = [x.detach()[chosen].requires_grad_() for x in features]
        teacher = [x.double() for x in teacher]

        masked = distiller(features, teacher, gates.double(), batch)
        masked.sum().backward()
        found = gradients(distiller, [])
        distiller.zero_grad()
        plain = share * distiller(gathered, [x[chosen] for x in teacher], torch.ones_like(gates[chosen]), batch)
        plain.sum().backward()

        torch.testing.assert_close(masked, plain, rtol=1e-9, atol=1e-13, check_dtype=False)
        for mine, wanted in zip(found, gradients(distiller, [])):
            torch.testing.assert_close(mine, wanted, rtol=1e-9, atol=1e-13)
        for mine, wanted in zip(features, gathered):
            if wanted.grad is not None:
                torch.testing.assert_close(mine.grad[chosen], wanted.grad, rtol=1e-9, atol=1e-13)

    @every_spotted
    @pytest.mark.parametrize("k", [0, 1, 2])
    def test_gives_every_spot_its_own_gate(self, name, k):
        spots = [(1, 1), (2, 2), (3, 3)]
        features, teacher, gates, batch = make_inputs(name, spots=spots)
        losses = build(name, spots=spots)(features, teacher, F.one_hot(torch.tensor(k), 3) * gates, batch)
        assert losses.nonzero().tolist() == [[k]]

    @every_spotted
    def test_sends_gradients_to_its_spots_and_everything_it_trains_but_not_to_the_teacher(self, name):
        distiller = build(name)
        features, teacher, *rest = make_inputs(name)
        teacher = [x.requires_grad_() for x in teacher]
        distiller(features, teacher, *rest).sum().backward()
        assert all(features[spot.student].grad.any() for spot in distiller.spots)
        fixed = set(distiller.teacher.parameters()) if name == "cc" else set()
        for parameter in distiller.main_parameters():
            assert parameter.grad is None if parameter in fixed else parameter.grad.any()
        assert all(x.grad is None for x in teacher)

    @every_spotted
    @pytest.mark.parametrize("teacher", [LARGER_MAPS, SMALLER_MAPS, ODD_MAPS], ids=["larger", "smaller", "odd"])
    def test_takes_a_teacher_with_other_map_sizes(self, name, teacher):
        features, *rest = make_inputs(name, STUDENT, teacher)
        losses = build(name, STUDENT, teacher)(features, *rest)
        losses.sum().backward()
        assert losses.isfinite().all()
        assert losses.all()

    @every_spotted
    def test_takes_a_spot_with_unequal_indices(self, name):
        longer = [STUDENT[0], *STUDENT]  # FSP, too, finds equal widths when the teacher's index is one more
        distiller = build(name, STUDENT, longer, spots=[(2, 3)])
        assert distiller(*make_inputs(name, STUDENT, longer, spots=[(2, 3)])).isfinite().all()

    @every_distiller
    def test_stays_in_float32_under_autocast(self, name):
        reference = build(name)(*make_inputs(name))
        features, teacher, gates, batch = make_inputs(name)
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            half = [[x.bfloat16() for x in side] for side in (features, teacher)]
            losses = build(name)(*half, gates, batch)
        assert losses.dtype == torch.float32
        # Half precision has 8 bits; the loss itself must add nothing to what its inputs lost.
        torch.testing.assert_close(losses, reference, rtol=0.05, atol=1e-4)

    @pytest.mark.parametrize("name", ["at", "sp", "rkd", "pkt", "nst", "fsp"])
    def test_computes_the_same_under_autocast_to_the_last_bit(self, name):
        """Those without modules: their inputs are the features themselves."""
        inputs = make_inputs(name)
        with torch.autocast("cpu", torch.bfloat16):
            found = build(name)(*inputs)
        assert torch.equal(found, build(name)(*inputs))

    @every_distiller
    def test_computes_without_looking_at_a_value(self, name):
        """What works on tensors that have a shape and no values neither waits for the device nor changes shape."""
        distiller = build(name)
        run_on_shapes_alone(distiller, *make_inputs(name, gate=GATES["some"]))

    @every_distiller
    def test_returns_from_its_state_dict(self, name):
        first, second = build(name, seed=1), build(name, seed=2)
        inputs = make_inputs(name)
        first(*inputs)  # running statistics and banks move
        second.load_state_dict(first.state_dict())
        for distiller in (first, second):
            distiller.train()
        torch.manual_seed(3)
        expected = first(*inputs)
        torch.manual_seed(3)
        assert torch.equal(second(*inputs), expected)

    @every_distiller
    def test_refuses_options_that_it_does_not_have(self, name):
        with pytest.raises(TypeError, match="colour"):
            build(name, options={"colour": "red"})


def run_on_shapes_alone(module: nn.Module, features, teacher, gates, batch) -> None:
    """Forward and backward with fake tensors, on which anything that needs a value raises an error."""
    with FakeTensorMode() as mode:
        state = {
            name: mode.from_tensor(x) for name, x in itertools.chain(module.named_parameters(), module.named_buffers())
        }
        features, teacher = ([mode.from_tensor(x) for x in side] for side in (features, teacher))
        batch = Batch(*(mode.from_tensor(x) for x in batch))
        losses = torch.func.functional_call(module, state, (features, teacher, mode.from_tensor(gates), batch))
        if len(losses):
            losses.sum().backward()


@pytest.mark.parametrize(
    "careless",
    [
        lambda x, gate: x[gate > 0].mean(),
        lambda x, gate: x[gate.nonzero()[:, 0]].mean(),
        lambda x, gate: x.mean() * gate.sum().item(),
        lambda x, gate: x.mean() if gate.any() else x.sum(),
    ],
    ids=["boolean index", "nonzero", "item", "branch"],
)
def test_looking_at_a_value_would_be_noticed(careless):
    class Careless(nn.Module):
        def forward(self, features, teacher, gates, batch):
            return careless(features[0], gates[:, 0])[None]

    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        run_on_shapes_alone(Careless(), *make_inputs("at"))


class TestSpots:
    def test_may_count_from_the_end(self):
        assert resolve_spots([(-3, -4), (-1, -1)], setting(teacher=DEEPER)) == [Spot(2, 2), Spot(4, 5)]

    def test_of_all_middle_features_are_as_many_as_the_shallower_network_has(self):
        expected = [(1, 1), (2, 2), (3, 3)]
        assert all_middle(setting(teacher=WIDER)) == expected
        assert all_middle(setting(teacher=DEEPER)) == expected
        assert all_middle(setting(student=DEEPER, teacher=WIDER)) == expected

    @pytest.mark.parametrize(
        ("spots", "message"),
        [
            ([(5, 4)], r"\[5, 4\]: the student of big-small has features 0 to 4"),
            ([(4, -6)], r"\[4, -6\]: the teacher of big-small has features 0 to 4"),
            ([(3, 4)], r"a 12x4x4 map \(student\) with a vector of 20 \(teacher\)"),
            ([(2, 2), (1, 3)], r"\[1, 3\] after \[2, 2\]; both indices must grow"),
            ([(1, 2), (2, 2)], r"\[2, 2\] after \[1, 2\]; both indices must grow"),
            ([(3, 3), (-2, -1)], "would pair"),
            ([], "empty"),
        ],
    )
    def test_that_cannot_be_are_refused_in_one_line(self, spots, message):
        refused(message, "at", spots=spots)

    @pytest.mark.parametrize("name", MAPS_ONLY)
    def test_must_be_maps_where_positions_are_compared(self, name):
        refused(f"{name.upper()} compares maps, big-small has a vector of 12 there", name, spots=[(-1, -1)])

    @pytest.mark.parametrize("name", ["fitnet", "sp", "rkd", "cc", "pkt", "crd", "reviewkd"])
    @pytest.mark.parametrize("spot", [(0, 0), (2, 1), (4, 4)])
    def test_may_be_maps_or_vectors_elsewhere(self, name, spot):
        losses = build(name, spots=[spot])(*make_inputs(name, spots=[spot]))
        assert losses.shape == (1,)
        assert losses.isfinite().all()


def refused(message: str, name: str, *args, **changes) -> None:
    with pytest.raises(UserError, match=message) as error:
        build(name, *args, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("crd", {"negatives": 0}, "crd.negatives is 0, expected a whole number above 0"),
        ("crd", {"negatives": 1e4}, "crd.negatives is 10000.0"),
        ("crd", {"temperature": "hot"}, "crd.temperature is 'hot'"),
        ("crd", {"momentum": 1.0}, "crd.momentum is 1.0, expected a number from 0 to below 1"),
        ("ft", {"rate": 0}, "ft.rate is 0"),
        ("vid", {"variance": -1}, "vid.variance is -1"),
        ("rkd", {"angle": True}, "rkd.angle is True"),
        ("rkd", {"distance": -1}, "rkd.distance is -1"),
    ],
)
def test_impossible_options_are_refused_in_one_line(name, options, message):
    refused(message, name, options=options)


@pytest.mark.parametrize("name", LOGITS_ONLY)
def test_what_distils_the_logits_alone_has_no_spots_to_choose(name):
    refused(f": {name} distils the logits alone", name, spots=[(1, 1)])


@pytest.mark.parametrize("name", ["at", "vid", "fsp", "nst"])
def test_a_distiller_that_finds_no_spot_in_the_networks_is_refused_and_kd_named(name):
    expected = (
        rf"{name.upper()} finds no spot in big-small \(1 student and 2 teacher features\); "
        "kd_loss.spots=.* chooses some, distiller=kd distils the logits alone"
    )
    refused(expected, name, student=[(12,)], teacher=[(20,), (20,)])


def test_the_teachers_embedding_of_cc_stays_as_it_is_also_under_weight_decay():
    distiller = build("cc")
    weights = [parameter.detach().clone() for parameter in distiller.teacher.parameters()]
    optimizer = torch.optim.SGD(distiller.main_parameters(), lr=0.5, weight_decay=0.1)
    distiller(*make_inputs("cc")).sum().backward()
    optimizer.step()
    for before, after in zip(weights, distiller.teacher.parameters(), strict=True):
        assert torch.equal(after.detach(), before)


@pytest.mark.parametrize("name", ["fitnet", "ft", "reviewkd"])
def test_batchnorm_statistics_do_not_depend_on_the_gates(name):
    after = []
    for gate in ("all", "one", "none"):
        distiller = build(name)
        distiller(*make_inputs(name, gate=GATES[gate]))
        after.append(torch.cat([buffer.double().flatten() for buffer in distiller.buffers()]))
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[0], after[2])


def test_fitnet_regresses_to_the_shape_of_the_teachers_feature():
    distiller = build("fitnet", STUDENT, LARGER_MAPS)
    assert distiller.regressors[0](torch.randn(2, *STUDENT[2])).shape[1:] == LARGER_MAPS[2]


@pytest.mark.parametrize("variance", [5.0, 0.1, 1000.0])
def test_vid_starts_from_the_variance_it_is_given(variance):
    distiller = build("vid", options={"variance": variance})
    for rho, channels in zip(distiller.rhos, (10, 16, 20)):
        torch.testing.assert_close(F.softplus(rho) + 1e-5, torch.full((channels,), variance))


def test_vid_predicts_with_three_convolutions_of_the_teachers_width_without_bias():
    weights = [tuple(weight.shape) for name, weight in build("vid").named_parameters() if name.startswith("means.1.")]
    assert weights == [(16, 8, 1, 1), (16, 16, 1, 1), (16, 16, 1, 1)]


@pytest.mark.parametrize("name", ["cc", "crd"])
def test_embeddings_have_the_width_of_the_setting(name):
    widths = {layer.out_features for layer in build(name, feat_dim=5).modules() if isinstance(layer, nn.Linear)}
    assert widths == {5}


class TestReviewKD:
    def test_fuses_in_the_width_of_the_deepest_feature_and_gives_the_teachers(self):
        distiller = build("reviewkd", STUDENT, LARGER_MAPS)
        for k, (s, t) in enumerate(distiller.spots[:-1]):
            residual = torch.randn(2, 12, 3, 3)
            fused, residual = distiller.fusions[k](torch.randn(2, *STUDENT[s]), residual)
            assert fused.shape[1:] == LARGER_MAPS[t]
            assert residual.shape[1:] == (12, *LARGER_MAPS[t][1:])
        convolutions = [layer for layer in distiller.modules() if isinstance(layer, nn.Conv2d)]
        sizes = [(layer.kernel_size[0], layer.bias is not None) for layer in convolutions]
        enter, attention, leave = (1, False), (1, True), (3, False)
        assert sizes == 3 * [enter, attention, leave] + [enter, leave]

    def test_fuses_in_at_most_512_channels(self):
        wide = [*STUDENT[:-1], (600,)]
        assert build("reviewkd", wide).fusions[-1].enter[0].out_channels == 512

    def test_lets_deeper_levels_into_the_loss_of_a_level_whose_own_gate_alone_is_open(self):
        distiller, (features, teacher, gates, batch) = build("reviewkd"), make_inputs("reviewkd")
        distiller(features, teacher, gates * F.one_hot(torch.tensor(1), 4), batch).sum().backward()
        assert [bool(features[k].grad.any()) if features[k].grad is not None else False for k in range(1, 5)] == [
            False,
            True,
            True,
            True,
        ]

    def test_of_one_image_passes_the_pooled_vector_by_the_running_statistics(self):
        distiller, (features, teacher, gates, batch) = build("reviewkd"), make_inputs("reviewkd")
        before = distiller.fusions[-1].enter[1].running_mean.clone()
        losses = distiller([x[:1] for x in features], [x[:1] for x in teacher], gates[:1], batch)
        assert losses.isfinite().all()
        assert torch.equal(distiller.fusions[-1].enter[1].running_mean, before)


class TestFT:
    def test_has_factors_of_half_the_teachers_width(self):
        distiller = build("ft")
        channels = [layer.out_channels for layer in distiller.modules() if isinstance(layer, nn.modules.conv._ConvNd)]
        encoder, decoder, translator = [20, 10, 10], [10, 20, 20], [12, 10, 10]
        assert channels == encoder + decoder + translator

    def test_pretrains_the_paraphraser_alone_and_without_the_student(self):
        distiller = build("ft")
        teacher = random_features(WIDER)
        trained = distiller.pretraining_parameters(None)
        before = [p.detach().clone() for p in distiller.translators.parameters()]
        optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        losses = []
        for _ in range(30):
            loss = distiller.pretraining_loss([], teacher)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert all(p.grad is None for p in distiller.translators.parameters())
        assert all(torch.equal(p, old) for p, old in zip(distiller.translators.parameters(), before))

    def test_leaves_the_paraphraser_alone_afterwards(self):
        distiller = build("ft")
        paraphraser, main = set(distiller.pretraining_parameters(None)), set(distiller.main_parameters())
        assert paraphraser | main == set(distiller.parameters())
        assert not paraphraser & main
        distiller(*make_inputs("ft")).sum().backward()
        assert all(parameter.grad is None for parameter in paraphraser)

    def test_sums_the_reconstruction_over_its_spots(self):
        teacher = random_features(WIDER)
        distiller = build("ft", spots=[(2, 2), (3, 3)])
        expected = sum(F.mse_loss(p(teacher[k]), teacher[k]) for p, k in zip(distiller.paraphrasers, (2, 3)))
        torch.testing.assert_close(distiller.pretraining_loss(None, teacher), expected)


class TestFSP:
    def test_names_pair_spot_and_widths_that_do_not_fit(self):
        with pytest.raises(UserError) as error:
            build("fsp", STUDENT, WIDER)
        assert str(error.value) == (
            "fsp: big-small, spot 1: student 6→6 channels, teacher 6→10; "
            "FSP compares channel by channel, pick a pair with equal widths or another distiller"
        )

    def test_looks_at_the_widths_on_both_sides_of_the_flow(self):
        entrance_differs = [(7, 16, 16), *STUDENT[1:]]
        refused("spot 1: student 6→6 channels, teacher 7→6", "fsp", STUDENT, entrance_differs)
        assert build("fsp", STUDENT, entrance_differs, spots=[(2, 2), (3, 3)]).spots == [(2, 2), (3, 3)]

    @pytest.mark.parametrize("spot", [(0, 0), (1, 0), (0, 1), (-5, 1)])
    def test_needs_a_feature_before_the_spot(self, spot):
        refused("needs a feature before the spot", "fsp", spots=[spot])

    def test_compares_the_flows_into_both_indices_of_a_spot(self):
        longer = [STUDENT[0], *STUDENT]  # the flow into the teacher's feature k + 1 is that into the student's k
        distiller = build("fsp", STUDENT, longer, spots=[(1, 2), (3, 4)])
        features = [x.detach() for x in random_features(STUDENT)]
        losses = distiller(features, [features[0], *features], torch.ones(BATCH, 2), None)
        assert losses.tolist() == [0, 0]

    def test_pretrains_the_students_stages_up_to_the_last_spot(self):
        net = ToyNet()
        shapes = net.feature_shapes(8, 8)
        trained = build("fsp", shapes, spots=[(1, 1)]).pretraining_parameters(net)
        stem = [*net.conv1.parameters(), *net.bn1.parameters(), *net.conv2.parameters(), *net.bn2.parameters()]
        assert list(map(id, trained)) == list(map(id, stem))
        all_of_it = build("fsp", shapes).pretraining_parameters(net)
        assert {id(p) for p in net.parameters()} - {id(p) for p in all_of_it} == {id(p) for p in net.fc.parameters()}

    def test_pretrains_on_all_samples(self):
        features, teacher, gates, batch = make_inputs("fsp")
        distiller = build("fsp")
        torch.testing.assert_close(
            distiller.pretraining_loss(features, teacher), distiller(features, teacher, gates, batch).sum()
        )

    def test_pretraining_brings_the_flows_of_two_networks_together(self):
        student, teacher = ToyNet(), ToyNet().requires_grad_(False).eval()
        distiller = build("fsp", student.feature_shapes(8, 8), teacher.feature_shapes(8, 8))
        image = toy_batch(16).image
        optimizer = torch.optim.SGD(distiller.pretraining_parameters(student), lr=0.05, momentum=0.9)
        losses = []
        for _ in range(30):
            loss = distiller.pretraining_loss(student.features(image)[0], teacher.features(image)[0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]
        assert all(parameter.grad is None for parameter in student.fc.parameters())


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("ft", "fsp")])
def test_others_have_no_phase_before_the_training(name):
    distiller = build(name)
    assert distiller.pretraining_parameters(ToyNet()) == []
    assert list(distiller.main_parameters()) == list(distiller.parameters())


@pytest.mark.parametrize("size", [(4, 4), (2, 8), (3, 5), (8, 8), (1, 1)])
def test_pooling_is_adaptive_average_pooling(size):
    feature = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(average_pool(feature, *size), F.adaptive_avg_pool2d(feature, size))


@pytest.mark.parametrize("size", [(3, 5), (6, 7), (8, 8), (1, 1), (11, 17)])
def test_windows_have_the_values_and_gradients_of_adaptive_pooling(size):
    feature = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, *size, dtype=torch.float64)
    results = []
    for pooled in (pool_windows(feature, *size), F.adaptive_avg_pool2d(feature, size)):
        results.append([pooled, *torch.autograd.grad((pooled * weight).sum(), feature)])
    torch.testing.assert_close(*results)


class TestPrecision:
    def test_products_inside_are_not_rounded_by_autocast(self):
        product = at_least(torch.float32)(lambda a, b: a @ b)
        a, b = torch.randn(2, 30, 30)
        with torch.autocast("cpu", torch.bfloat16):
            assert (a @ b).dtype == torch.bfloat16
            found = product(a, b)
        torch.testing.assert_close(found, (a.double() @ b.double()).float(), rtol=1e-5, atol=1e-5)

    def test_arguments_arrive_in_one_type_and_the_result_leaves_in_the_callers(self):
        seen = []

        @at_least(torch.float64)
        def loss(x, gate, index, *, scale):
            seen.extend([x.dtype, gate.dtype, index.dtype])
            return (x * gate).sum() * scale

        index = torch.arange(3)
        assert loss(torch.ones(3, dtype=torch.bfloat16), torch.ones(3), index, scale=2).dtype == torch.float32
        assert loss(torch.ones(3, dtype=torch.float64), torch.ones(3), index, scale=2).dtype == torch.float64
        assert seen == [torch.float64, torch.float64, torch.int64] * 2
