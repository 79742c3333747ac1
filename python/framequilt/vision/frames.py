"""Frames of a clip: which file, which frames, at what times; decoded with bounded memory.

Files are decoded with PyAV (extra `[video]`), frame-exact: an index of presentation times is read
from the packets without decoding, the policy picks frames, and only stretches that hold a picked
frame are decoded. Every frame is handed to `transform` (normally the resize) as soon as it is
decoded, so memory does not grow with resolution. A broken file ends in an error with a code or,
if part of it decodes, in the frames that are there; it never hangs.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from framequilt.errors import InvalidArgument, NotFound, Unsupported
from framequilt.vision import selection
from framequilt.vision.selection import Selection

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

Picture: TypeAlias = "PilImage | npt.NDArray[np.uint8]"
Pixels: TypeAlias = npt.NDArray[np.uint8]
Transform: TypeAlias = Callable[[Pixels], npt.NDArray[Any]]
Progress: TypeAlias = Callable[[int, int], None]

_MAX_PACKETS = 20_000_000  # 4 days of 60 fps video: past it the file is an attack, not a clip
_MAX_PIXELS = 1 << 26  # 8192 x 8192
_SEEK_GAP = 8  # decoding this many frames costs less than a seek
# Playlists are not opened: their entries could name any file or address this process can reach.
_CONTAINERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpeg,mpegts,mpegvideo,m4v,flv,ogg,asf,gif,h264,"
    "hevc,ivf,av1,obu,apng,webp_pipe,nut,mjpeg,yuv4mpegpipe,wav,mp3,aac,flac"
)
_OPTIONS = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}


@dataclass(frozen=True)
class ClipInfo:
    """What a file holds: frames, frames per second, seconds, shown size in pixels, rotation."""

    frames: int
    fps: float
    duration: float
    width: int
    height: int
    rotation: int  # degrees counter-clockwise that were applied, a multiple of 90
    codec: str


@dataclass(frozen=True)
class Frames:
    """Picked frames. `images` is uint8 [frames, height, width, 3] RGB, or what `transform` gave."""

    images: npt.NDArray[Any]
    times: tuple[float, ...]
    duration: float
    indices: tuple[int, ...]
    info: ClipInfo | None = None

    def __len__(self) -> int:
        return len(self.times)


VideoSource: TypeAlias = (
    "str | os.PathLike[str] | bytes | IO[bytes] | Sequence[Picture] | Pixels | Frames"
)


def _import_av() -> Any:
    try:
        import av
    except ImportError as cause:
        raise Unsupported(
            "decoding video files needs PyAV, which is not installed",
            hint="pip install 'framequilt[video]', or pass frames as arrays or PIL images",
        ) from cause
    return av


def to_rgb_array(picture: Picture) -> Pixels:
    """One picture as uint8 [height, width, 3] RGB; grey and alpha are converted."""
    from PIL import Image

    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise InvalidArgument(
                f"a frame array must be uint8 [height, width, 3], got {picture.dtype} "
                f"{list(picture.shape)}",
                hint="scale floats to 0..255 and convert with astype(numpy.uint8)",
            )
        if picture.ndim == 3 and picture.shape[2] == 3:
            if 0 in picture.shape:
                raise InvalidArgument(f"a frame of shape {list(picture.shape)} is empty")
            return picture
        if picture.ndim == 3 and picture.shape[2] not in (1, 4):
            raise InvalidArgument(
                f"a frame array must be [height, width, 3], got {list(picture.shape)}",
                hint="channels come last and are RGB",
            )
        image = Image.fromarray(picture[..., 0] if picture.shape[-1:] == (1,) else picture)
    elif isinstance(picture, Image.Image):
        image = picture
    else:
        raise InvalidArgument(f"a frame is a PIL image or a uint8 array, got {type(picture)!r}")
    return np.asarray(image.convert("RGB"))


class _Clip:
    """An opened video file and its index of presentation times. Use as a context manager."""

    def __init__(self, source: str | IO[bytes], name: str) -> None:
        self._av = _import_av()
        # What PyAV raises on damaged data: its own errors, and Python's from values it converts.
        self.failures = (self._av.error.FFmpegError, ValueError, OverflowError, RuntimeError)
        self._source = source
        self.name = name
        self._container: Any = None
        self._stream: Any = None
        self.pts: list[int] = []
        self._keyframes: list[int] = []  # their pts, sorted
        self._timed = True

    def __enter__(self) -> _Clip:
        self._open()
        try:
            self._build_index()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        if self._container is not None:
            self._container.close()
            self._container = None

    def _open(self) -> None:
        self.close()
        if not isinstance(self._source, str):
            self._source.seek(0)
        try:
            self._container = self._av.open(
                self._source, options=dict(_OPTIONS), metadata_errors="replace"
            )
        except self.failures as cause:
            raise InvalidArgument(
                f"{self.name} is not a video file that can be read: {cause}",
                hint="check that the file is complete; ffprobe shows what is wrong with it",
            ) from cause
        videos = self._container.streams.video
        if not videos:
            kinds = sorted({s.type for s in self._container.streams})
            self.close()
            raise InvalidArgument(
                f"{self.name} has no video stream (it holds: {', '.join(kinds) or 'nothing'})"
            )
        self._stream = videos[0]
        if self._stream.codec_context is None:
            self.close()
            raise Unsupported(
                f"{self.name}: no decoder for this video codec",
                hint="convert the file, for instance with ffmpeg -i in -c:v libx264 out.mp4",
            )
        self._stream.thread_type = "AUTO"

    def _packets(self) -> Iterator[Any]:
        """Packets of the video stream; a read error ends the file there."""
        packets = self._container.demux(self._stream)
        for _ in range(_MAX_PACKETS):
            try:
                packet = next(packets)
            except (StopIteration, *self.failures):
                return
            yield packet
        raise InvalidArgument(f"{self.name} has more than {_MAX_PACKETS} packets")

    def _build_index(self) -> None:
        for packet in self._packets():
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.pts is None:
                self._timed = False
                break
            self.pts.append(packet.pts)
            if packet.is_keyframe:
                self._keyframes.append(packet.pts)
        if len(set(self.pts)) != len(self.pts):
            self._timed = False
        if not self._timed:
            # Times that are absent or repeat cannot name a frame: count frames by decoding.
            self._open()
            self._keyframes = []
            self.pts = list(range(sum(1 for _ in self._decoded())))
        self.pts.sort()
        self._keyframes.sort()
        if not self.pts:
            raise InvalidArgument(f"{self.name} has no frames")

    def _decoded(self) -> Iterator[Any]:
        """Frames from the current position on; packets that do not decode are skipped."""
        for packet in self._packets():
            try:
                frames = packet.decode()
            except self.failures:
                continue
            for frame in frames:
                if frame.width * frame.height > _MAX_PIXELS:
                    raise InvalidArgument(
                        f"{self.name}: a frame of {frame.width} x {frame.height} is too large"
                    )
                yield frame

    @property
    def fps(self) -> float:
        """Average frames per second: the container's, else frames over time, else 25."""
        rate = self._stream.average_rate or self._stream.guessed_rate
        if rate and 0 < float(rate) < 1e6:
            return float(rate)
        if self._timed and len(self.pts) > 1 and self._stream.time_base:
            span = float((self.pts[-1] - self.pts[0]) * self._stream.time_base)
            if span > 0:
                return (len(self.pts) - 1) / span
        return 25.0

    @property
    def codec(self) -> str:
        return str(self._stream.codec_context.name)

    @property
    def size(self) -> tuple[int, int]:
        """Coded width and height, before rotation."""
        return self._stream.codec_context.width, self._stream.codec_context.height

    def variable_times(self) -> list[float] | None:
        """Presentation times in seconds if they leave the constant rate by a frame or more."""
        if not self._timed or not self._stream.time_base:
            return None
        base, fps = float(self._stream.time_base), self.fps
        times = [(p - self.pts[0]) * base for p in self.pts]
        if all(abs(t - i / fps) < 1.0 / fps for i, t in enumerate(times)):
            return None
        return times

    def pick(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Yields (index, frame) for sorted unique indices, decoding as little as it can.

        A frame that the file lost (a packet that does not decode) is replaced by the one that is
        on screen at its time; what comes after the last decodable frame is left out.
        """
        self._open()
        if not self._timed:
            wanted = set(indices)
            yield from ((i, f) for i, f in enumerate(self._decoded()) if i in wanted)
            return
        done = 0
        if self._keyframes:
            for index, frame in self._pick_seeking(indices):
                yield index, frame
                done += 1
        if done < len(indices):
            self._open()
            yield from self._pick_from_start(indices[done:])

    def _pick_seeking(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Exact frames, jumping over stretches; stops at the first one that is not met exactly."""
        frames, position = self._decoded(), -1
        for index in indices:
            target = self.pts[index]
            key = bisect.bisect_right(self._keyframes, target) - 1
            start = bisect.bisect_left(self.pts, self._keyframes[key]) if key >= 0 else 0
            if start > position + _SEEK_GAP:
                try:
                    self._container.seek(self._keyframes[key], stream=self._stream)
                except self.failures:
                    return
                frames = self._decoded()
            frame = next((f for f in frames if f.pts is not None and f.pts >= target), None)
            if frame is None or frame.pts != target:
                return
            position = index
            yield index, frame

    def _pick_from_start(self, indices: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """The frame on screen at each wanted time, decoding everything up to it."""
        at, held = 0, None
        for frame in self._decoded():
            if frame.pts is None:
                continue
            while at < len(indices) and frame.pts > self.pts[indices[at]]:
                yield indices[at], frame if held is None else held
                at += 1
            if at == len(indices):
                return
            held = frame
        if held is not None and at < len(indices) and held.pts == self.pts[indices[at]]:
            yield indices[at], held


def _upright(frame: Any) -> tuple[Pixels, int]:
    """Frame as RGB with the file's rotation applied, and that rotation in degrees."""
    pixels: Pixels = frame.to_ndarray(format="rgb24")
    quarter_turns = round(float(getattr(frame, "rotation", 0) or 0) / 90.0) % 4
    if quarter_turns:
        pixels = np.ascontiguousarray(np.rot90(pixels, quarter_turns))
    return pixels, quarter_turns * 90


@contextlib.contextmanager
def _opened(source: str | os.PathLike[str] | bytes | IO[bytes]) -> Iterator[_Clip]:
    if isinstance(source, (bytes, bytearray, memoryview)):
        with _Clip(io.BytesIO(source), "video data") as clip:
            yield clip
        return
    if isinstance(source, (str, os.PathLike)):
        name = os.fspath(source)
        if "://" in name:
            raise InvalidArgument(
                f"{name} is an address, and addresses are not opened",
                hint="download the file and pass its path",
            )
        path = Path(name)
        if not path.is_file():
            raise NotFound(f"no video file {name}")
        with _Clip(str(path.resolve()), name) as clip:
            yield clip
        return
    if not hasattr(source, "read") or not hasattr(source, "seek"):
        raise InvalidArgument(
            f"a video is a path, bytes, a seekable file, or frames; got {type(source)!r}"
        )
    with _Clip(source, str(getattr(source, "name", "video file"))) as clip:
        yield clip


def probe(source: str | os.PathLike[str] | bytes | IO[bytes]) -> ClipInfo:
    """Reads what a file holds; decodes one frame. Errors: not_found, invalid_argument."""
    frames = load_frames(source, frames=1, policy="uniform")
    assert frames.info is not None
    return frames.info


def _select(
    total: int,
    fps_of_clip: float,
    variable: list[float] | None,
    policy: str,
    max_frames: int,
    fps: float | None,
    timestamps: Sequence[float] | None,
) -> Selection:
    limit = min(max_frames, total)  # no frame is repeated to fill a quota
    if timestamps is not None:
        shown = variable or [i / fps_of_clip for i in range(total)]
        wanted = [float(t) for t in timestamps]
        duration = max(shown[-1], total / fps_of_clip) if variable else total / fps_of_clip
        return Selection(selection.frames_on_screen(shown, wanted), tuple(wanted), duration)
    if variable is not None:
        last = variable[-1]
        if policy == "uniform" or fps is None:
            wanted = [float(t) for t in np.linspace(0.0, last, limit)]
        else:
            wanted = [i / fps for i in range(int(last * fps) + 1)]
            if len(wanted) > limit:
                wanted = [float(t) for t in np.linspace(0.0, last, limit)]
        indices = tuple(dict.fromkeys(selection.frames_on_screen(variable, wanted)))
        return Selection(indices, tuple(variable[i] for i in indices), last + 1.0 / fps_of_clip)
    if policy == "fps":
        return selection.select_fps(total, fps_of_clip, limit, fps or 1.0, force=fps is None)
    if policy == "uniform":
        return selection.select_uniform(total, fps_of_clip, limit)
    if policy == "centres":
        return selection.select_centres(total, fps_of_clip, limit, fps or 1.0)
    raise InvalidArgument(
        f"unknown frame sampling policy {policy!r}", hint="fps, uniform or centres"
    )


def _check_request(
    frames: int | None, fps: float | None, timestamps: Sequence[float] | None
) -> int:
    if frames is not None and frames < 1:
        raise InvalidArgument(f"frames must be at least 1, got {frames}")
    if fps is not None and not 0 < fps <= 1000:
        raise InvalidArgument(f"fps must be in (0, 1000], got {fps}")
    if timestamps is not None:
        if len(timestamps) == 0:
            raise InvalidArgument("timestamps is empty; it lists times in seconds")
        for a in timestamps:
            if not (0 <= float(a) < 1e9):
                raise InvalidArgument(f"a timestamp is a time in seconds >= 0, got {a}")
    return frames if frames is not None else 64


def load_frames(
    source: VideoSource,
    *,
    frames: int | None = None,
    fps: float | None = None,
    timestamps: Sequence[float] | None = None,
    policy: str = "fps",
    transform: Transform | None = None,
    progress: Progress | None = None,
) -> Frames:
    """Picks and decodes frames of a clip.

    Args:
        source: path, bytes or seekable binary file of a video; or frames as PIL images, as uint8
            arrays [height, width, 3], or as one array [frames, height, width, 3]; or `Frames`.
        frames: at most this many frames (64). Without `fps`, exactly that many at equal
            distances, or all if the clip has fewer.
        fps: frames per second of video to look at. For lists of frames: the rate they were
            taken at (1), all of them are used unless `frames` is smaller.
        timestamps: for files, the times in seconds to look at (`frames` does not thin them); for
            lists, the time of each frame.
        policy: "fps", "uniform" or "centres", see `framequilt.vision.selection`.
        transform: called with each uint8 [height, width, 3] frame at once after decoding; its
            results are stacked instead of the frames. Without it frames must have one size.
        progress: called as progress(done, total) after each frame.

    Returns:
        Frames in the order of time. Frame times follow the clip's average rate, or its real
        presentation times where the rate varies.

    Errors: not_found, invalid_argument, unsupported (PyAV or a codec is missing).
    """
    limit = _check_request(frames, fps, timestamps)
    if isinstance(source, Frames):
        if frames is not None or fps is not None or timestamps is not None:
            raise InvalidArgument(
                "these frames are picked already; frames, fps and timestamps cannot change that",
                hint="give the options to load_frames, or pass the video itself",
            )
        if transform is None or not len(source):
            return source
        return replace(source, images=np.stack([transform(f) for f in source.images]))
    if isinstance(source, np.ndarray):
        if source.ndim != 4:
            raise InvalidArgument(
                f"a video array must be uint8 [frames, height, width, 3], got {list(source.shape)}",
                hint="pass one picture as image=",
            )
        return _from_pictures(list(source), frames, fps, timestamps, transform, progress)
    if isinstance(source, (list, tuple)):
        return _from_pictures(source, frames, fps, timestamps, transform, progress)
    return _from_file(source, limit, fps, timestamps, policy, transform, progress)  # type: ignore[arg-type]


def _from_file(
    source: str | os.PathLike[str] | bytes | IO[bytes],
    limit: int,
    fps: float | None,
    timestamps: Sequence[float] | None,
    policy: str,
    transform: Transform | None,
    progress: Progress | None,
) -> Frames:
    with _opened(source) as clip:
        chosen = _select(
            len(clip.pts), clip.fps, clip.variable_times(), policy, limit, fps, timestamps
        )
        unique = sorted(set(chosen.indices))
        block: npt.NDArray[Any] | None = None
        places: dict[int, int] = {}  # index of a frame -> its row of the block
        rotation, size = 0, clip.size
        for index, frame in clip.pick(unique):
            try:
                pixels, rotation = _upright(frame)
            except clip.failures:
                continue
            size = (pixels.shape[1], pixels.shape[0])
            image = pixels if transform is None else transform(pixels)
            if block is None:
                block = np.empty((len(unique), *image.shape), image.dtype)
            _check_shapes(image.shape, block.shape[1:])
            block[len(places)] = image
            places[index] = len(places)
            if progress is not None:
                progress(len(places), len(unique))
        kept = [(i, t) for i, t in zip(chosen.indices, chosen.times, strict=True) if i in places]
        if block is None:
            raise InvalidArgument(
                f"no frame of {clip.name} could be decoded",
                hint="the file is damaged; ffprobe shows what is wrong with it",
            )
        rows = [places[i] for i, _ in kept]
        info = ClipInfo(
            frames=len(clip.pts),
            fps=clip.fps,
            duration=chosen.duration,
            width=size[0],
            height=size[1],
            rotation=rotation,
            codec=clip.codec,
        )
    return Frames(
        images=block[: len(rows)] if rows == list(range(len(rows))) else block[rows],
        times=tuple(t for _, t in kept),
        duration=chosen.duration,
        indices=tuple(i for i, _ in kept),
        info=info,
    )


def _check_shapes(shape: tuple[int, ...], first: tuple[int, ...]) -> None:
    if shape != first:
        raise InvalidArgument(
            f"frames differ in size: {list(first)} and {list(shape)}",
            hint="pass transform= to resize them",
        )


def _stack(images: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    for image in images:
        _check_shapes(image.shape, images[0].shape)
    return np.stack(images)


def _from_pictures(
    pictures: Sequence[Picture],
    limit: int | None,
    fps: float | None,
    timestamps: Sequence[float] | None,
    transform: Transform | None,
    progress: Progress | None,
) -> Frames:
    total = len(pictures)
    if total == 0:
        raise InvalidArgument("a video of 0 frames has nothing to look at")
    if timestamps is not None:
        if len(timestamps) != total:
            raise InvalidArgument(f"{total} frames, but {len(timestamps)} timestamps")
        if any(b < a for a, b in zip(timestamps, timestamps[1:], strict=False)):
            raise InvalidArgument("timestamps of a list of frames must not decrease")
        times = [float(t) for t in timestamps]
        duration = times[-1] + (times[-1] - times[0]) / (total - 1) if total > 1 else times[-1]
    else:
        rate = fps or 1.0
        times = [i / rate for i in range(total)]
        duration = total / rate
    keep: Sequence[int] = range(total)
    if limit is not None and limit < total:
        keep = selection.uniform_indices(total, limit)
    images = []
    for index in keep:
        pixels = to_rgb_array(pictures[index])
        images.append(pixels if transform is None else transform(pixels))
        if progress is not None:
            progress(len(images), len(keep))
    return Frames(_stack(images), tuple(times[i] for i in keep), duration, tuple(keep))
