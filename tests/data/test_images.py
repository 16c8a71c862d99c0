"""Whatever the mode of an image file, what comes out is 8-bit RGB."""

import os
import subprocess

import numpy as np
import pytest
from pictures import noise, smooth_picture
from PIL import Image
from refusals import refusal

from datasets.images import open_rgb

GREY = noise(8, 8)


def written(tmp_path, picture, name="picture.png", **options):
    path = tmp_path / name
    picture.save(path, **options)
    return np.asarray(open_rgb(path))


def test_grey_and_every_range_of_values_become_black_to_white(tmp_path):
    twelve_bits = GREY.astype(np.uint16) << 4
    signed = twelve_bits.astype(np.int32) - 1024
    sixteen_bits = GREY.astype(np.uint16) << 8 | 0x55  # keep their upper eight
    for name, picture, value_range in (
        ("grey.png", GREY, None),
        ("deep.png", sixteen_bits, None),
        ("deep.tif", sixteen_bits, None),
        ("twelve.png", twelve_bits, (0, 4096)),
        ("signed.tif", signed, (-1024, 3072)),
        ("shares.tif", GREY.astype(np.float32) / 256, (0, 1)),
    ):
        Image.fromarray(picture).save(tmp_path / name)
        pixels = np.asarray(open_rgb(tmp_path / name, value_range=value_range))
        assert np.array_equal(pixels, np.stack([GREY] * 3, -1)), name
    outside = np.asarray(open_rgb(tmp_path / "signed.tif", value_range=(-1000, 1000)))[..., 0]
    assert (outside[signed <= -1000] == 0).all()
    assert (outside[signed >= 1000] == 255).all()


def test_only_the_documented_formats_are_opened(tmp_path, monkeypatch):
    """Pillow hands PostScript to Ghostscript."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_, **__: pytest.fail("another program is called"))
    for kind in ("EPS", "PCX"):
        smooth_picture(8, 8).save(tmp_path / "000.png", kind)
        line = refusal(open_rgb, tmp_path / "000.png")
        assert line.endswith("000.png: cannot be read as an image (damaged, or of an unknown format)")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM", "MPO"])
def test_every_documented_format_is_opened_whatever_its_ending(tmp_path, kind):
    smooth_picture(8, 8).save(tmp_path / "000.jpg", kind)
    assert open_rgb(tmp_path / "000.jpg").size == (8, 8)


def test_transparent_pixels_show_white_instead_of_what_lies_under_them(tmp_path):
    colours = noise(8, 8, 4)
    colours[..., 3] = 255
    colours[:4, :, 3] = 0
    pixels = written(tmp_path, Image.fromarray(colours))
    assert (pixels[:4] == 255).all()
    assert np.array_equal(pixels[4:], colours[4:, :, :3])


def test_palettes_are_looked_up_with_or_without_a_transparent_entry(tmp_path):
    picture = smooth_picture(8, 8).quantize(16)
    expected = np.asarray(picture.convert("RGB"))
    assert np.array_equal(written(tmp_path, picture), expected)
    see_through = written(tmp_path, picture, "clear.png", transparency=0)
    hidden = np.asarray(picture) == 0
    assert hidden.any()
    assert (see_through[hidden] == 255).all()
    assert np.array_equal(see_through[~hidden], expected[~hidden])


def test_cmyk_and_bilevel_become_rgb(tmp_path):
    assert written(tmp_path, smooth_picture(8, 8).convert("CMYK"), "print.jpg").shape == (8, 8, 3)
    assert set(np.unique(written(tmp_path, Image.fromarray(GREY).convert("1")))) == {0, 255}


def test_what_cannot_be_brought_to_eight_bits_or_to_a_size_is_refused(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "heights.tif")
    Image.new("L", (10_010, 10)).save(tmp_path / "line.png")
    os.mkfifo(tmp_path / "pipe.png")
    for name, complaint in {
        "heights.tif": "cannot be read as an image (floating-point values",
        "line.png": "cannot be read as an image (10010 x 10 pixels, too thin to be scaled)",
        "none.png": "cannot be read as an image (No such file",
        "pipe.png": "is a folder, a link, a pipe or a device, expected a file",
    }.items():
        assert f"{tmp_path / name}: {complaint}" in refusal(open_rgb, tmp_path / name)
