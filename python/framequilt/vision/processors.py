"""Pictures to the float32 tensors a vision tower reads, described by `preprocessor.json`.

Video frames are resized straight to the tower's square; one image can be cut into tiles of a
larger grid ("anyres"), preceded by an overview of the whole. Pixels take 256 values, so rescaling
and normalisation are one table look-up. Stateless; any thread.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from framequilt.errors import CorruptModel, InvalidArgument, NotFound
from framequilt.vision.frames import (
    Frames,
    Picture,
    Pixels,
    Progress,
    Transform,
    VideoSource,
    load_frames,
)
from framequilt.vision.frames import to_rgb_array as _to_rgb_array

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | IO[bytes] | Picture"
Tensor: TypeAlias = npt.NDArray[np.float32]
Tiles: TypeAlias = tuple[int, int, int, int, int, int]

_MAX_PIXELS = 1 << 27
_RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}


@dataclass(frozen=True)
class ImageTensors:
    """One image as the engine takes it.

    `data` is float32 [1 + tiles, 3, size, size], overview first, tiles in raster order. `tiles` is
    None or (rows, cols, crop_top, crop_left, crop_height, crop_width); the crop is the part of the
    tiles' joint feature grid that shows the image and not padding, in patches.
    """

    data: Tensor
    tiles: Tiles | None


def load_image(source: ImageSource) -> Pixels:
    """Reads a picture as uint8 [height, width, 3] RGB, upright as its EXIF data says.

    Takes a path, bytes, a binary file, a `data:` address, a PIL image or a uint8 array.
    Errors: not_found, invalid_argument.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    name = "image data"
    if isinstance(source, str) and source.startswith("data:"):
        source = decode_data_url(source)
    if isinstance(source, (np.ndarray, Image.Image)):
        return _to_rgb_array(source)
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        if "://" in name:
            raise InvalidArgument(
                f"{name} is an address, and addresses are not opened",
                hint="download the file and pass its path, or use a data: address",
            )
        if not Path(name).is_file():
            raise NotFound(f"no image file {name}")
        source = Path(name).read_bytes()
    if isinstance(source, (bytes, bytearray, memoryview)):
        source = io.BytesIO(source)
    if not hasattr(source, "read"):
        raise InvalidArgument(
            f"an image is a path, bytes, PIL image or array, got {type(source)!r}"
        )
    try:
        image: Image.Image = Image.open(source)
        if image.width * image.height > _MAX_PIXELS:
            raise InvalidArgument(f"{name}: {image.width} x {image.height} pixels are too many")
        image = ImageOps.exif_transpose(image)
        return _to_rgb_array(image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, EOFError) as cause:
        raise InvalidArgument(f"{name} is not an image that can be read: {cause}") from cause
    except Image.DecompressionBombError as cause:
        raise InvalidArgument(f"{name}: {cause}") from cause


def decode_data_url(url: str) -> bytes:
    """The bytes of a base64 `data:` address. Errors: invalid_argument."""
    head, comma, body = url.partition(",")
    if not comma or not head.endswith(";base64"):
        raise InvalidArgument("a data: address must hold base64, as data:image/png;base64,...")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as cause:
        raise InvalidArgument(f"the data: address is not valid base64: {cause}") from cause


def select_best_resolution(
    height: int, width: int, resolutions: Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """The (height, width) that shows most of the image's own pixels, then wastes fewest.

    First one wins a tie (LLaVA-NeXT's rule).
    """
    best, most, least_waste = resolutions[0], 0, math.inf
    for candidate_height, candidate_width in resolutions:
        scale = min(candidate_width / width, candidate_height / height)
        shown = min(int(width * scale) * int(height * scale), width * height)
        waste = candidate_width * candidate_height - shown
        if shown > most or (shown == most and waste < least_waste):
            best, most, least_waste = (candidate_height, candidate_width), shown, waste
    return best


def fitted_size(height: int, width: int, target: tuple[int, int]) -> tuple[int, int]:
    """Largest (height, width) of the image's shape inside `target`; the short side rounds up."""
    scale_height, scale_width = target[0] / height, target[1] / width
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), target[0]), target[1]
    return target[0], min(math.ceil(width * scale_height), target[1])


def feature_crop(
    height: int, width: int, grid_height: int, grid_width: int
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of the feature grid that shows an image of the given size."""
    if width / height > grid_width / grid_height:
        inner = int(round(height * (grid_width / width), 7))
        top = (grid_height - inner) // 2
        return top, 0, grid_height - 2 * top, grid_width
    inner = int(round(width * (grid_height / height), 7))
    left = (grid_width - inner) // 2
    return 0, left, grid_height, grid_width - 2 * left


@dataclass(frozen=True)
class Preprocessor:
    """What `preprocessor.json` says, and the code that does it."""

    size: int
    patch: int
    resample: str = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    rescale: float = 1 / 255
    image_grid_pinpoints: tuple[tuple[int, int], ...] | None = None
    time_instruction: bool = False

    @classmethod
    def open(cls, directory: str | os.PathLike[str], patch: int) -> Preprocessor:
        """Reads `preprocessor.json` of a model directory; `patch` comes from its `config.json`.

        Errors: not_found, corrupt_model.
        """
        path = Path(directory) / "preprocessor.json"
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as cause:
            raise NotFound(f"{path} is missing, and the model has a vision tower") from cause
        except (OSError, ValueError) as cause:
            raise CorruptModel(f"{path} cannot be read: {cause}") from cause
        return cls.from_record(record, patch, str(path))

    @classmethod
    def from_record(cls, record: Any, patch: int, name: str = "preprocessor.json") -> Preprocessor:
        """Checks a parsed `preprocessor.json`. Errors: corrupt_model."""
        known = {"size", "resample", "mean", "std", "rescale", "image_grid_pinpoints",
                 "time_instruction"}  # fmt: skip
        if not isinstance(record, Mapping):
            raise CorruptModel(f"{name} is not a JSON object")
        unknown = set(record) - known
        if unknown:
            raise CorruptModel(f"{name} has unknown keys: {', '.join(sorted(unknown))}")
        try:
            pinpoints = record.get("image_grid_pinpoints")
            made = cls(
                size=int(record["size"]),
                patch=patch,
                resample=str(record.get("resample", "bicubic")),
                mean=_triple(record["mean"]),
                std=_triple(record["std"]),
                rescale=float(record.get("rescale", 1 / 255)),
                image_grid_pinpoints=None
                if pinpoints is None
                else tuple((int(h), int(w)) for h, w in pinpoints),
                time_instruction=bool(record.get("time_instruction", False)),
            )
        except (KeyError, TypeError, ValueError) as cause:
            raise CorruptModel(f"{name}: {type(cause).__name__} {cause}") from cause
        made.check(name)
        return made

    def check(self, name: str = "preprocessor") -> None:
        """Errors: corrupt_model."""
        if not 1 <= self.size <= 8192 or self.patch < 1 or self.size < self.patch:
            raise CorruptModel(f"{name}: size {self.size} with patches of {self.patch} pixels")
        if self.resample not in _RESAMPLE:
            raise CorruptModel(f"{name}: resample {self.resample!r}, known: {', '.join(_RESAMPLE)}")
        if not all(s > 0 and math.isfinite(s) for s in self.std):
            raise CorruptModel(f"{name}: std must be positive, got {self.std}")
        for height, width in self.image_grid_pinpoints or ():
            if height < self.size or width < self.size or height % self.size or width % self.size:
                raise CorruptModel(
                    f"{name}: grid [{height}, {width}] is no multiple of {self.size}"
                )

    @cached_property
    def _table(self) -> Tensor:
        """Normalised value of each pixel value, float32 [256, 3].

        Rescaled in float64, rounded to float32, normalised in float32: the order of operations of
        transformers' image processors, so that results are equal to the bit.
        """
        rescaled = (np.arange(256, dtype=np.uint8).astype(np.float64) * self.rescale).astype(
            np.float32
        )
        mean, std = np.array(self.mean, np.float32), np.array(self.std, np.float32)
        table: Tensor = (rescaled[:, None] - mean) / std
        return table

    def _normalise(self, pixels: Pixels) -> Tensor:
        """uint8 [height, width, 3] -> float32 [3, height, width]."""
        return np.stack([self._table[:, c].take(pixels[..., c]) for c in range(3)])

    def _resize(self, image: PilImage, height: int, width: int) -> PilImage:
        from PIL import Image

        return image.resize((width, height), Image.Resampling(_RESAMPLE[self.resample]))

    def resize_frame(self, pixels: Pixels) -> Pixels:
        """uint8 [height, width, 3] -> uint8 [size, size, 3]; the aspect is not kept."""
        from PIL import Image

        return np.asarray(self._resize(Image.fromarray(pixels), self.size, self.size))

    def pixels(self, pixels: Pixels) -> Tensor:
        """uint8 [height, width, 3] -> float32 [3, size, size]."""
        return self._normalise(self.resize_frame(pixels))

    def frame(self, picture: Picture) -> Tensor:
        """One picture as float32 [3, size, size]."""
        return self.pixels(_to_rgb_array(picture))

    def video(
        self,
        source: VideoSource,
        *,
        frames: int | None = None,
        fps: float | None = None,
        timestamps: Sequence[float] | None = None,
        policy: str = "fps",
        progress: Progress | None = None,
    ) -> Frames:
        """As `load_frames`, with `images` float32 [frames, 3, size, size].

        `Frames` whose images are already of that form pass through unchanged.
        """
        if isinstance(source, Frames) and source.images.dtype == np.float32:
            if source.images.shape[1:] != (3, self.size, self.size):
                raise InvalidArgument(
                    f"prepared frames must be [frames, 3, {self.size}, {self.size}], got "
                    f"{list(source.images.shape)}"
                )
            transform: Transform | None = None
        else:
            transform = self.pixels
        return load_frames(
            source,
            frames=frames,
            fps=fps,
            timestamps=timestamps,
            policy=policy,
            transform=transform,
            progress=progress,
        )

    def image(self, source: ImageSource, *, tiled: bool = True) -> ImageTensors:
        """One image. `tiled` cuts it into tiles where the model has a grid for that.

        Not tiled (several images in one prompt): padded to a square with the mean colour, as
        LLaVA-OneVision does; models without a grid resize it straight to the square.
        """
        from PIL import Image

        pixels = load_image(source)
        if self.image_grid_pinpoints is None:
            return ImageTensors(self.frame(pixels)[None], None)
        if not tiled:
            return ImageTensors(self.frame(self._padded_square(pixels))[None], None)
        height, width = pixels.shape[:2]
        grid = select_best_resolution(height, width, self.image_grid_pinpoints)
        fitted = fitted_size(height, width, grid)
        canvas = np.zeros((*grid, 3), np.uint8)
        top, left = (grid[0] - fitted[0]) // 2, (grid[1] - fitted[1]) // 2
        image = Image.fromarray(pixels)
        canvas[top : top + fitted[0], left : left + fitted[1]] = np.asarray(
            self._resize(image, *fitted)
        )
        rows, cols = grid[0] // self.size, grid[1] // self.size
        data = np.empty((1 + rows * cols, 3, self.size, self.size), np.float32)
        data[0] = self.frame(pixels)
        for row in range(rows):
            for col in range(cols):
                y, x = row * self.size, col * self.size
                tile = canvas[y : y + self.size, x : x + self.size]
                data[1 + row * cols + col] = self._normalise(tile)
        side = self.size // self.patch
        return ImageTensors(
            data, (rows, cols, *feature_crop(height, width, rows * side, cols * side))
        )

    def _padded_square(self, pixels: Pixels) -> Pixels:
        height, width = pixels.shape[:2]
        side = max(height, width)
        canvas = np.empty((side, side, 3), np.uint8)
        canvas[:] = np.array([int(m * 255) for m in self.mean], np.uint8)
        top, left = (side - height) // 2, (side - width) // 2
        canvas[top : top + height, left : left + width] = pixels
        return canvas


def _triple(values: Any) -> tuple[float, float, float]:
    r, g, b = (float(v) for v in values)
    return r, g, b
