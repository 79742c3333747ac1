"""Preprocessing against transformers' own image processors, bit for bit."""

from __future__ import annotations

import base64
import io

import numpy as np
import pytest
from PIL import Image

from framequilt.errors import CorruptModel, InvalidArgument, NotFound
from framequilt.vision import Frames, Preprocessor, load_image, processors

GRID = [[48, 48], [48, 96], [96, 48], [96, 96], [48, 144], [144, 96]]
RECORD = {
    "size": 48,
    "resample": "bicubic",
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "rescale": 1 / 255,
    "image_grid_pinpoints": GRID,
    "time_instruction": False,
}
SIZES = [(48, 48), (31, 77), (200, 90), (97, 96), (5, 300), (333, 33), (150, 151), (1, 1)]


def noise(height: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(height * 1000 + width)
    smooth = np.linspace(0, 255, width)[None, :, None] * np.ones((height, 1, 3))
    return np.clip(smooth + rng.normal(0, 40, (height, width, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", SIZES)
def test_frames_equal_the_siglip_processor(size):
    siglip = pytest.importorskip("transformers.models.siglip.image_processing_pil_siglip")
    reference = siglip.SiglipImageProcessorPil(
        size={"height": 48, "width": 48}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    pixels = noise(*size)
    want = reference(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    got = Preprocessor(size=48, patch=8).frame(pixels)
    assert got.dtype == np.float32 and got.shape == (3, 48, 48)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_equal_the_onevision_processor(size):
    onevision = pytest.importorskip(
        "transformers.models.llava_onevision.image_processing_pil_llava_onevision"
    )
    reference = onevision.LlavaOnevisionImageProcessorPil(
        size={"height": 48, "width": 48},
        image_mean=RECORD["mean"],
        image_std=RECORD["std"],
        image_grid_pinpoints=GRID,
    )
    pixels = noise(*size)
    want = reference(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
    got = Preprocessor.from_record(RECORD, patch=8).image(pixels)
    assert got.tiles is not None and got.tiles[0] * got.tiles[1] == len(got.data) - 1
    np.testing.assert_array_equal(got.data, want)


@pytest.mark.parametrize("size", SIZES[:-1])
def test_several_images_are_padded_as_onevision_does(size):
    onevision = pytest.importorskip(
        "transformers.models.llava_onevision.image_processing_pil_llava_onevision"
    )
    reference = onevision.LlavaOnevisionImageProcessorPil(
        size={"height": 48, "width": 48},
        image_mean=RECORD["mean"],
        image_std=RECORD["std"],
        image_grid_pinpoints=GRID,
    )
    pixels = noise(*size)
    pair = [[Image.fromarray(pixels), Image.fromarray(pixels)]]
    want = reference(pair, return_tensors="np")["pixel_values"][0]
    got = Preprocessor.from_record(RECORD, patch=8).image(pixels, tiled=False)
    assert got.tiles is None
    np.testing.assert_array_equal(got.data[0], want[0] if want.ndim == 4 else want)


@pytest.mark.parametrize("size", [*SIZES, (720, 1280), (1080, 607), (384, 385)])
@pytest.mark.parametrize("grid", [(27, 54), (54, 27), (81, 81), (12, 18)])
def test_crop_is_what_transformers_unpads(size, grid):
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.llava_onevision.modeling_llava_onevision")
    rows = torch.arange(grid[0])[None, :, None].expand(1, *grid)
    cols = torch.arange(grid[1])[None, None, :].expand(1, *grid)
    want = modeling.unpad_image(torch.cat([rows, cols]), size)
    top, left, height, width = processors.feature_crop(*size, *grid)
    assert (height, width) == tuple(want.shape[1:])
    if want.numel():
        assert (top, left) == (int(want[0, 0, 0]), int(want[1, 0, 0]))


@pytest.mark.parametrize("size", [*SIZES, (720, 1280), (1080, 607)])
def test_best_resolution_is_the_one_transformers_takes(size):
    utils = pytest.importorskip("transformers.image_processing_utils")
    assert processors.select_best_resolution(*size, GRID) == (
        utils.select_best_resolution(size, GRID)
    )


def test_a_model_without_a_grid_gets_one_square():
    record = {**RECORD, "image_grid_pinpoints": None}
    got = Preprocessor.from_record(record, patch=8).image(noise(31, 77))
    assert got.tiles is None and got.data.shape == (1, 3, 48, 48)


def test_video_is_a_float32_block_and_passes_through():
    preprocessor = Preprocessor(size=48, patch=8)
    stack = np.stack([noise(40, 60), noise(40, 60)[::-1]])
    got = preprocessor.video(stack, fps=2.0)
    assert got.images.shape == (2, 3, 48, 48) and got.images.dtype == np.float32
    np.testing.assert_array_equal(got.images[1], preprocessor.frame(stack[1]))
    assert got.times == (0.0, 0.5)
    assert preprocessor.video(got) is got
    raw = Frames(stack, (0.0, 1.0), 2.0, (0, 1))
    np.testing.assert_array_equal(preprocessor.video(raw).images, got.images)
    with pytest.raises(InvalidArgument):
        Preprocessor(size=32, patch=8).video(got)


@pytest.mark.parametrize(
    "change",
    [
        {"size": 0},
        {"size": "x"},
        {"resample": "magic"},
        {"std": [1, 1, 0]},
        {"mean": [1, 1]},
        {"image_grid_pinpoints": [[50, 48]]},
        {"extra": 1},
    ],
)
def test_a_broken_description_is_a_corrupt_model(change):
    with pytest.raises(CorruptModel):
        Preprocessor.from_record({**RECORD, **change}, patch=8)


def test_description_files(tmp_path):
    with pytest.raises(NotFound):
        Preprocessor.open(tmp_path, 8)
    (tmp_path / "preprocessor.json").write_text("{")
    with pytest.raises(CorruptModel):
        Preprocessor.open(tmp_path, 8)


# --- Reading pictures ----------------------------------------------------------------------------


def png(pixels: np.ndarray) -> bytes:
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    return target.getvalue()


def test_every_way_to_name_a_picture_gives_the_same_pixels(tmp_path):
    pixels = noise(20, 30)
    data = png(pixels)
    path = tmp_path / "a.png"
    path.write_bytes(data)
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    sources = [path, str(path), data, io.BytesIO(data), url, Image.fromarray(pixels), pixels]
    for source in sources:
        np.testing.assert_array_equal(load_image(source), pixels)


def test_grey_alpha_palette_and_turned_pictures_become_rgb(tmp_path):
    pixels = noise(20, 30)
    image = Image.fromarray(pixels)
    for mode in ("L", "LA", "P", "RGBA", "CMYK"):
        assert load_image(image.convert(mode)).shape == (20, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn 90 degrees clockwise to show
    path = tmp_path / "turned.png"
    image.save(path, exif=exif)
    np.testing.assert_array_equal(load_image(path), np.rot90(pixels, -1))


@pytest.mark.parametrize(
    "source",
    [
        b"",
        b"no picture",
        png(np.zeros((4, 4, 3), np.uint8))[:40],
        "https://example.com/a.png",
        "data:image/png;base64,@@@",
        "data:text/plain,hello",
        3.5,
        np.zeros((4, 4, 3)),
    ],
)
def test_what_is_no_picture_is_refused(source):
    with pytest.raises(InvalidArgument):
        load_image(source)


def test_a_missing_picture_is_not_found(tmp_path):
    with pytest.raises(NotFound):
        load_image(tmp_path / "none.png")
