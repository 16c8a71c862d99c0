"""Whatever the mode of an image file, what comes out is 8-bit RGB."""

import os

import numpy as np
from pictures import noise, refusal, smooth_picture
from PIL import Image

from datasets.images import open_rgb

GREY = noise(8, 8)


def written(tmp_path, picture, name="picture.png", **options):
    path = tmp_path / name
    picture.save(path, **options)
    return np.asarray(open_rgb(path))


def test_grey_is_repeated(tmp_path):
    pixels = written(tmp_path, Image.fromarray(GREY))
    assert np.array_equal(pixels, np.stack([GREY] * 3, -1))


def test_sixteen_bits_keep_the_upper_eight(tmp_path):
    deep = GREY.astype(np.uint16) << 8 | 0x55
    for name in ("deep.png", "deep.tif"):
        assert np.array_equal(written(tmp_path, Image.fromarray(deep), name)[..., 0], GREY)


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
    assert set(np.unique(written(tmp_path, Image.fromarray(GREY).convert("1")))) <= {0, 255}


def test_what_cannot_be_brought_to_eight_bits_or_to_a_size_is_refused(tmp_path):
    Image.fromarray(np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)).save(tmp_path / "heights.tif")
    assert "heights.tif: cannot be read as an image (floating-point values" in refusal(
        open_rgb, tmp_path / "heights.tif"
    )
    Image.new("L", (10_010, 10)).save(tmp_path / "line.png")
    assert "(10010 x 10 pixels, too thin to be scaled)" in refusal(open_rgb, tmp_path / "line.png")


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    path = tmp_path / "pipe.png"
    os.mkfifo(path)
    assert refusal(open_rgb, path) == f"{path}: is a pipe, expected a file"


def test_a_missing_file_is_refused_by_name(tmp_path):
    path = tmp_path / "none.png"
    assert refusal(open_rgb, path) == f"{path}: cannot be read as an image (No such file or directory)"
