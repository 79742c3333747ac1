"""The generated world: what is in a video, before any pixel is drawn.

Lengths are in units of a 64 x 64 canvas (the renderer scales them), times run from 0 (first
frame) to 1 (last frame). Everything is drawn from one `numpy.random.Generator`, so a seed and a
frame count fix a video completely.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

CANVAS = 64.0
COLOURS = ("red", "green", "blue", "yellow", "purple", "cyan")
COLOUR_RGB = (
    (220, 40, 40),
    (40, 180, 50),
    (50, 80, 230),
    (235, 215, 40),
    (180, 50, 200),
    (40, 210, 215),
)
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = ("left", "right", "up", "down")
DIRECTION_VECTORS = ((-1.0, 0.0), (1.0, 0.0), (0.0, -1.0), (0.0, 1.0))
STILL = 4
BOUNCED = 5
PLATE_WIDTH = 18.0
PLATE_HEIGHT = 20.0
_COUNT_SHARE = (0.17, 0.25, 0.29, 0.29)


@dataclass
class Actor:
    """One coloured shape and its path: positions at `times`, linear between them."""

    colour: int
    shape: int
    radius: float
    times: Array  # [knots]
    xs: Array  # [knots], canvas units
    ys: Array  # [knots], canvas units
    motion: int  # index into DIRECTIONS, STILL or BOUNCED
    appears: float = -1.0  # time of its first frame; negative: there from the start

    @property
    def name(self) -> str:
        """The words that answers use for it; colours are unique within a video."""
        return f"{COLOURS[self.colour]} {SHAPES[self.shape]}"

    def positions(self, t: Array) -> Array:
        """Centre at each time, [len(t), 2] as x, y."""
        return np.stack([np.interp(t, self.times, self.xs), np.interp(t, self.times, self.ys)], 1)


@dataclass
class Plate:
    """A white sign with a digit, shown in one frame only."""

    digit: int
    frame: int
    x: float
    y: float


@dataclass
class Touch:
    """Actor `mover` touches actor `target` from `begin` to `end`."""

    mover: int
    target: int
    begin: float
    end: float


@dataclass
class World:
    """All that a video shows. `backgrounds` has one seed per segment; `cut` splits the segments."""

    frames: int
    actors: list[Actor]
    plates: list[Plate]
    touch: Touch | None
    cut: float  # time of the cut, 2.0 when there is none
    backgrounds: list[int]
    scroll: tuple[float, float]  # background motion, canvas units over the whole video
    shake: float  # canvas units
    noise: float  # grey levels
    blur: bool
    dots: int
    look: int  # seed of everything that is only looks
    _cache: dict[str, Array] = field(default_factory=dict, repr=False)

    @property
    def times(self) -> Array:
        """Time of each frame, [frames]."""
        return frame_times(self.frames)

    def tracks(self) -> Array:
        """Centres without camera shake, [actors, frames, 2]."""
        if "tracks" not in self._cache:
            t = self.times
            self._cache["tracks"] = np.stack([a.positions(t) for a in self.actors])
        return self._cache["tracks"]

    def visible(self) -> npt.NDArray[np.bool_]:
        """Which actor is there in which frame, [actors, frames]."""
        t = self.times
        return np.stack([t >= a.appears for a in self.actors])


def frame_times(frames: int) -> Array:
    """Times of `frames` frames; a single frame sits in the middle."""
    return np.linspace(0.0, 1.0, frames) if frames > 1 else np.array([0.5])


_CHECK = np.linspace(0.0, 1.0, 25)


def _fits(actor: Actor, others: list[Actor]) -> bool:
    mine = actor.positions(_CHECK)
    for other in others:
        gap = np.hypot(*(mine - other.positions(_CHECK)).T).min()
        if gap < actor.radius + other.radius + 2.5:
            return False
    return True


def _inside(x: float, y: float, radius: float) -> bool:
    low, high = radius + 1.0, CANVAS - radius - 1.0
    return low <= x <= high and low <= y <= high


def _place(rng: np.random.Generator, radius: float) -> tuple[float, float]:
    low, high = radius + 1.0, CANVAS - radius - 1.0
    x, y = rng.uniform(low, high, 2)
    return float(x), float(y)


def _touching_pair(
    rng: np.random.Generator, looks: list[tuple[int, int, float]]
) -> tuple[list[Actor], Touch] | None:
    (c0, s0, r0), (c1, s1, r1) = looks[0], looks[1]
    for _ in range(12):
        x, y = _place(rng, r1)
        way = int(rng.integers(4))
        vx, vy = DIRECTION_VECTORS[way]
        reach, run = 0.9 * (r0 + r1), float(rng.uniform(18.0, 34.0))
        cx, cy = x - vx * reach, y - vy * reach
        sx, sy = cx - vx * run, cy - vy * run
        if not _inside(sx, sy, r0):
            continue
        begin = float(rng.uniform(0.35, 0.7))
        bounce = rng.random() < 0.35
        target = Actor(c1, s1, r1, np.array([0.0]), np.array([x]), np.array([y]), STILL)
        if bounce:
            back = float(rng.uniform(0.5, 0.9))
            end = begin + 0.15
            knots = np.array([0.0, begin, end, 1.0])
            xs = np.array([sx, cx, cx, cx + (sx - cx) * back])
            ys = np.array([sy, cy, cy, cy + (sy - cy) * back])
            mover = Actor(c0, s0, r0, knots, xs, ys, BOUNCED)
        else:
            end = 1.0
            knots = np.array([0.0, begin])
            mover = Actor(c0, s0, r0, knots, np.array([sx, cx]), np.array([sy, cy]), way)
        return [mover, target], Touch(0, 1, begin, end)
    return None


def _lone_actor(
    rng: np.random.Generator, look: tuple[int, int, float], appears: float, still: bool
) -> Actor | None:
    colour, shape, radius = look
    x, y = _place(rng, radius)
    if still:
        at = (np.array([0.0]), np.array([x]), np.array([y]))
        return Actor(colour, shape, radius, *at, STILL, appears)
    way = int(rng.integers(4))
    vx, vy = DIRECTION_VECTORS[way]
    begin = max(0.0, appears)
    run = float(rng.uniform(20.0, 42.0)) * (1.0 if begin == 0.0 else 0.75)
    ex, ey = x + vx * run, y + vy * run
    if not _inside(ex, ey, radius):
        return None
    path = (np.array([begin, 1.0]), np.array([x, ex]), np.array([y, ey]))
    return Actor(colour, shape, radius, *path, way, appears)


def _plate_at(rng: np.random.Generator, actors: list[Actor], t: float) -> tuple[float, float]:
    """The least crowded of a few random places for the sign at time t."""
    n = 10
    xs = rng.uniform(PLATE_WIDTH / 2, CANVAS - PLATE_WIDTH / 2, n)
    ys = rng.uniform(PLATE_HEIGHT / 2, CANVAS - PLATE_HEIGHT / 2, n)
    room = np.full(n, 99.0)
    at = np.array([t])
    for actor in actors:
        x, y = actor.positions(at)[0]
        room = np.minimum(room, np.maximum(np.abs(xs - x), np.abs(ys - y)) - actor.radius)
    best = int(room.argmax())
    return float(xs[best]), float(ys[best])


def part_of(frame: int, frames: int) -> int:
    """0 beginning, 1 middle, 2 end, -1 too close to a boundary to ask about."""
    share = (frame + 0.5) / frames
    for part, (low, high) in enumerate(((0.0, 0.3), (0.365, 0.635), (0.7, 1.0))):
        if low <= share <= high:
            return part
    return -1


def sample_world(
    rng: np.random.Generator, frames: int, plate_share: float = 0.85, plate_each: float = 0.0
) -> World:
    """Draws a world. `plate_each` > 0 is for tower training: every frame has a sign with that
    chance, and the picture is as crowded as it gets."""
    crowded = plate_each > 0.0
    wanted = len(COLOURS) if crowded else 1 + int(rng.choice(4, p=_COUNT_SHARE))
    colours = rng.permutation(len(COLOURS))
    looks = [
        (int(c), int(rng.integers(len(SHAPES))), float(rng.uniform(7.0, 8.8))) for c in colours
    ]
    actors: list[Actor] = []
    touch: Touch | None = None
    if wanted >= 2 and rng.random() < 0.55:
        pair = _touching_pair(rng, looks)
        if pair is not None:
            actors, touch = list(pair[0]), pair[1]
    late: list[float] = []
    while len(actors) < wanted:
        appears = -1.0
        if actors and len(late) < 2 and rng.random() < 0.4:
            appears = float(rng.uniform(0.15, 0.65))
            if any(abs(appears - other) < 0.2 for other in late):
                appears = -1.0
        still = rng.random() < 0.35
        for _ in range(30):
            actor = _lone_actor(rng, looks[len(actors)], appears, still)
            if actor is not None and _fits(actor, actors):
                actors.append(actor)
                if appears > 0:
                    late.append(appears)
                break
        else:
            break
    if not actors:
        x, y = _place(rng, looks[0][2])
        actors = [Actor(*looks[0], np.array([0.0]), np.array([x]), np.array([y]), STILL)]
    times = frame_times(frames)
    plates: list[Plate] = []
    if plate_each > 0.0:
        shown = [f for f in range(frames) if rng.random() < plate_each]
    elif rng.random() < plate_share:
        allowed = [f for f in range(frames) if part_of(f, frames) >= 0]
        shown = [int(rng.choice(allowed))] if allowed else [0]
    else:
        shown = []
    for f in shown:
        x, y = _plate_at(rng, actors, float(times[f]))
        plates.append(Plate(int(rng.integers(10)), f, x, y))
    has_cut = frames > 1 and rng.random() < 0.4
    moving = rng.random() < 0.35
    scroll = rng.uniform(-60.0, 60.0, 2) if moving else np.zeros(2)
    return World(
        frames=frames,
        actors=actors,
        plates=plates,
        touch=touch,
        cut=float(rng.uniform(0.25, 0.75)) if has_cut else 2.0,
        backgrounds=[int(v) for v in rng.integers(1 << 31, size=2 if has_cut else 1)],
        scroll=(float(scroll[0]), float(scroll[1])),
        shake=float(rng.uniform(0.4, 1.5)) if rng.random() < 0.4 else 0.0,
        noise=float(rng.uniform(0.0, 8.0)),
        blur=bool(rng.random() < 0.2),
        dots=int(rng.integers(0, 7)),
        look=int(rng.integers(1 << 31)),
    )
