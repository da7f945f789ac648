"""Images of every mode, as somebody's own folder has them, reach the model with their range and the right way up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from tokenreduce.benchmarks.benchmark import Benchmark, Sample
from tokenreduce.benchmarks.images import rgb
from tokenreduce.benchmarks.jsonl import JsonLines
from tokenreduce.evaluation.prompts import Prompts

Shown = Callable[..., np.ndarray[Any, Any]]


@pytest.fixture
def shown(tmp_path: Path) -> Shown:
    """Saves an image as a file of this name, and gives what the jsonl benchmark makes of it, as an array."""

    def shown(image: Image.Image, name: str, **options: Any) -> np.ndarray[Any, Any]:
        (tmp_path / "images").mkdir(exist_ok=True)
        image.save(tmp_path / "images" / name, **options)
        line = {"image": name, "question": "?", "answer": "x"}
        (tmp_path / "questions.jsonl").write_text(json.dumps(line), encoding="utf-8")
        benchmark = JsonLines(path=str(tmp_path))
        (found,) = benchmark.images(benchmark[0])
        assert found.mode == "RGB"
        return np.asarray(found)

    return shown


RAMP = np.array([[0, 257 * 100, 65535]])
GREY = [[[0] * 3, [100] * 3, [255] * 3]]


def sixteen_bits(mode: str, kind: str) -> Image.Image:
    return Image.frombytes(mode, (3, 1), RAMP.astype(kind).tobytes())


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (sixteen_bits("I;16", "<u2"), "ramp.png"),
        (sixteen_bits("I;16", "<u2"), "ramp.tif"),
        (sixteen_bits("I;16B", ">u2"), "ramp.tif"),
        (Image.fromarray(RAMP.astype(np.int32)), "ramp.tif"),
        (Image.fromarray(RAMP.astype(np.int32)), "ramp.pgm"),
        (Image.fromarray((RAMP / 65535).astype(np.float32)), "ramp.tif"),
        (Image.fromarray((RAMP // 257).astype(np.uint8)), "ramp.png"),
    ],
)
def test_a_range_is_kept(shown: Shown, image: Image.Image, name: str) -> None:
    assert shown(image, name).tolist() == GREY


def test_dark_images_of_known_range_stay_dark(shown: Shown) -> None:
    dark = Image.frombytes("I;16", (3, 1), np.array([[0, 100, 257]], "<u2").tobytes())
    assert shown(dark, "dark.png").max() == 1
    assert shown(Image.fromarray(np.array([[0, 100, 257]], np.int32)), "dark.pgm").max() == 1


def test_zero_is_white_where_the_file_says_so(shown: Shown) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0
    assert shown(sixteen_bits("I;16", "<u2"), "negative.tif", tiffinfo=tags)[0, :, 0].tolist() == [255, 155, 0]


def test_twelve_bits_have_their_own_white(tmp_path: Path) -> None:
    # 4095, 0 and 2048, packed as TIFF packs them; Pillow reads such files and writes none.
    tags = [(256, 3, 3), (257, 3, 1), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 8), (277, 3, 1), (279, 4, 5)]
    entries = b"".join(
        number.to_bytes(2, "little")
        + kind.to_bytes(2, "little")
        + (1).to_bytes(4, "little")
        + value.to_bytes(4, "little")
        for number, kind, value in tags
    )
    data = bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00])
    header = b"II*\0" + (8 + len(data)).to_bytes(4, "little")
    file = tmp_path / "twelve.tif"
    file.write_bytes(header + data + len(tags).to_bytes(2, "little") + entries + bytes(4))
    with Image.open(file) as image:
        assert np.asarray(rgb(image))[0, :, 0].tolist() == [255, 0, 128]


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        (np.array([[0, 127.5, 255]], np.float32), "floating-point numbers from 0 to 255"),
        (np.array([[-1, 0, 1]], np.float32), "floating-point numbers from -1 to 1"),
        (np.array([[0, np.nan, 1]], np.float32), "floating-point numbers from nan to nan"),
        (np.array([[0, 127, 255]], np.int32), "32-bit whole numbers from 0 to 255"),
        (np.array([[0, 1, 70000]], np.int32), "32-bit whole numbers from 0 to 70000"),
        (np.array([[-1, 1, 1000]], np.int32), "32-bit whole numbers from -1 to 1000"),
    ],
)
def test_a_range_that_cannot_be_known_is_refused_by_name(
    shown: Shown, values: np.ndarray[Any, Any], numbers: str
) -> None:
    with pytest.raises(ValueError, match=rf"depth\.tif: its pixels are {numbers}, and .*: save the image with 8 or 16"):
        shown(Image.fromarray(values), "depth.tif")


def test_what_is_transparent_is_white(shown: Shown) -> None:
    colors = [(200, 0, 0, 255), (0, 0, 0, 0), (0, 0, 0, 51)]
    expected = [[200, 0, 0], [255, 255, 255], [204, 204, 204]]
    image = Image.new("RGBA", (3, 1))
    image.putdata(colors)
    assert shown(image, "alpha.png")[0].tolist() == expected
    assert shown(image, "alpha.webp", lossless=True, exact=True)[0].tolist() == expected
    grey = Image.new("LA", (2, 1))
    grey.putdata([(100, 255), (0, 0)])
    assert shown(grey, "alpha.png")[0].tolist() == [[100] * 3, [255] * 3]


def test_palettes_are_looked_up_with_their_transparency(shown: Shown) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putdata([0, 1])
    assert shown(palette, "colors.png")[0].tolist() == [[10, 20, 30], [40, 50, 60]]
    assert shown(palette, "see_through.png", transparency=1)[0].tolist() == [[10, 20, 30], [255, 255, 255]]
    assert shown(palette, "see_through.gif", transparency=0)[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_a_transparent_color_is_white(shown: Shown) -> None:
    image = Image.new("RGB", (2, 1), (1, 2, 3))
    image.putpixel((1, 0), (9, 9, 9))
    assert shown(image, "color.png", transparency=(1, 2, 3))[0].tolist() == [[255] * 3, [9] * 3]
    assert shown(Image.new("L", (1, 1), 7), "grey.png", transparency=7)[0].tolist() == [[255] * 3]
    assert shown(sixteen_bits("I;16", "<u2"), "grey16.png", transparency=0)[0, :, 0].tolist() == [255, 100, 255]


@pytest.mark.parametrize("name", ["print.tif", "print.jpg"])
def test_ink_is_color(shown: Shown, name: str) -> None:
    inks = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red, green, blue = shown(inks, name, **({"quality": 100} if name.endswith("jpg") else {}))[0, 0].tolist()
    assert red > 250 and green < 5 and blue < 5


def test_other_modes(shown: Shown) -> None:
    bits = Image.new("1", (2, 1))
    bits.putpixel((1, 0), 255)
    assert shown(bits, "bits.png")[0].tolist() == [[0] * 3, [255] * 3]
    assert shown(Image.new("YCbCr", (1, 1), (255, 128, 128)), "luma.tif")[0].tolist() == [[255] * 3]
    lab = shown(Image.new("LAB", (1, 1), (255, 128, 128)), "lab.tif")[0, 0]
    assert lab.min() > 245


TURNED = {1: "abcd", 2: "badc", 3: "dcba", 4: "cdab", 5: "acbd", 6: "cadb", 7: "dbca", 8: "bdac"}
"""Corners of a picture, row by row, that a camera wrote as abcd with each orientation."""


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *(("RGB", name) for name in ("turned.png", "turned.tif", "turned.webp")),
        *((mode, name) for mode in ("L", "I;16") for name in ("turned.png", "turned.tif")),
    ],
)
@pytest.mark.parametrize("orientation", TURNED)
def test_orientation_is_applied(shown: Shown, mode: str, orientation: int, name: str) -> None:
    corners = np.array([[0, 80], [160, 240]], np.uint8)
    image = Image.fromarray(corners * np.uint16(257)) if mode == "I;16" else Image.fromarray(corners).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = shown(image, name, exif=exif, **({"lossless": True} if name.endswith("webp") else {}))
    assert "".join("abcd"[round(value / 80)] for value in found[..., 0].flatten()) == TURNED[orientation]


def test_of_several_frames_the_first_is_shown(shown: Shown) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "lime")]
    for name in ("moving.gif", "moving.png", "pages.tif", "moving.webp"):
        found = shown(frames[0], name, save_all=True, append_images=frames[1:])
        assert found[0, 0, 0] > 250 and found[0, 0, 1] < 5 and found[0, 0, 2] < 5


def test_the_images_of_any_benchmark_are_converted(tmp_path: Path) -> None:
    file = tmp_path / "ramp.png"
    sixteen_bits("I;16", "<u2").save(file)

    class Files(Benchmark):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Sample:
            return Sample("1", "?", ("x",), "all", "1")

        def images(self, sample: Sample) -> list[Image.Image]:
            return [Image.open(file)]

    (found,) = Prompts(Files()).images(Files()[0])
    assert np.asarray(found).tolist() == GREY


def test_an_image_without_a_file_is_named_by_its_place() -> None:
    with pytest.raises(ValueError, match="row 3: its pixels are floating-point"):
        rgb(Image.fromarray(np.array([[2.0]], np.float32)), "row 3")
