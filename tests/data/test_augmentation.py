"""Batched augmentation, measured against torchvision's, image by image."""

import itertools

import pytest
import torch
from pictures import noise
from scipy.special import chdtrc
from torchvision.transforms import functional as TF

from datasets.loading.augment import AUGMENTATIONS, Augment

MEAN, STD = (0.49, 0.48, 0.44), (0.2, 0.25, 0.3)
CPU = torch.device("cpu")


def augmentation(name, size=(32, 32)):
    return Augment(name, size, MEAN, STD, CPU)


def one_picture(height=32, width=32):
    return torch.from_numpy(noise(3, height, width))


def draw(augment, count, seed=0):
    return augment.draw(count, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "size"),
    [("crop_flip", (32, 32)), ("crop_flip", (16, 24)), ("crop", (64, 64)), ("flip", (32, 32)), ("none", (8, 8))],
)
def test_every_crop_and_flip_equals_torchvisions(name, size):
    augment = augmentation(name, size)
    corners = range(2 * augment.padding + 1)
    places = list(itertools.product(corners, corners, (0, 1) if augment.recipe.flip else (0,)))
    picture = one_picture(*size)
    store, rows = torch.stack([picture, picture.flip(1)]), torch.arange(len(places)) % 2
    ours = augment(augment.pad(store), rows, torch.tensor(places).T)

    framed = [TF.pad(TF.to_pil_image(picture), augment.padding) for picture in store]
    for image, number, (row, column, mirrored) in zip(ours, rows, places):
        cut = TF.crop(framed[number], row, column, *size)
        expected = TF.normalize(TF.to_tensor(TF.hflip(cut) if mirrored else cut), MEAN, STD)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "size"), [("crop_flip", (32, 32)), ("crop", (16, 24)), ("flip", (16, 24))])
def test_what_a_gpu_computes_has_the_same_bits(name, size):
    augment = augmentation(name, size)
    store = augment.pad(torch.from_numpy(noise(5, 3, *size)))
    rows, moves = torch.tensor([4, 0, 4, 2, 1, 3]), draw(augment, 6)
    pixels = augment._index_pixels(store, rows, moves)
    assert torch.equal(pixels, augment._copy_windows(store, rows, moves))


def test_crops_and_flips_are_uniform_and_independent():
    top, left, flip = draw(augmentation("crop_flip"), 9 * 9 * 2 * 200)
    cell = (top * 9 + left) * 2 + flip
    counts = torch.bincount(cell, minlength=162)
    assert len(counts) == 162
    assert chdtrc(161, (counts - 200).square().sum().item() / 200) > 1e-3  # the test of χ²


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_augmentation_moves_only_what_its_name_says(name):
    top, left, flip = draw(augmentation(name), 500)
    cropped = name in ("crop_flip", "crop", "trivialaugment")
    flipped = name not in ("crop", "none")
    assert (top.max(), left.max()) == ((8, 8) if cropped else (0, 0))
    assert flip.max() == int(flipped)
