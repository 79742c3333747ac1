"""Questions about a world, with the answers that follow from its geometry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from framequilt.demo.world import (
    BOUNCED,
    CANVAS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    STILL,
    Array,
    World,
    part_of,
)

KINDS = (
    "digit",  # retrieval: the digit on a sign that shows in one frame only
    "part",  # retrieval: in which part of the video it shows
    "direction",  # question answering: which way a shape moves
    "count",  # question answering: how many shapes
    "touch",  # question answering: what touched what
    "attribute",  # question answering: shape of a colour, colour of a shape
    "where",  # question answering: in which quarter at the start, at the end
    "order",  # understanding: what comes first
    "same",  # understanding: what stays in place, does the scene stay the same
)
NUMBERS = ("zero", "one", "two", "three", "four", "five")
PARTS = ("beginning", "middle", "end")
_MARGIN = 4.0  # canvas units around the middle lines where `where` is not asked
_MOVED = 10.0  # canvas units that a shape must visibly travel
_APART = 0.12  # time between two events that are put in order

TEMPLATES: dict[str, tuple[str, ...]] = {
    "digit": (
        "which digit is shown?",
        "what digit is on the sign?",
        "which number does the sign show?",
    ),
    "part": (
        "in which part of the video does the sign appear?",
        "when is the sign shown?",
        "which part of the video shows the sign?",
    ),
    "direction": (
        "which way does the {x} move?",
        "in which direction does the {x} go?",
        "where does the {x} move to?",
    ),
    "count": (
        "how many shapes are there?",
        "how many shapes does the video show?",
        "count the shapes.",
    ),
    "touch": (
        "what does the {x} touch?",
        "which shape touches the {x}?",
        "what is touched by the {x}?",
    ),
    "shape_of": ("what shape is {x}?", "which shape is the {x} one?"),
    "colour_of": ("what colour is the {x}?", "which colour does the {x} have?"),
    "where_now": ("where is the {x}?",),
    "where_start": ("where is the {x} at the start?", "where does the {x} start?"),
    "where_end": ("where is the {x} at the end?", "where does the {x} end?"),
    "side_now": ("is the {x} on the left or on the right?",),
    "side_start": ("is the {x} on the left or on the right at the start?",),
    "side_end": ("is the {x} on the left or on the right at the end?",),
    "first": ("which comes first, the {x} or the {y}?", "what appears first, the {x} or the {y}?"),
    "sign_shape": ("is the sign shown before or after the {x} appears?",),
    "sign_touch": ("is the sign shown before or after the {x} touches the {y}?",),
    "sign_cut": ("is the sign shown before or after the scene changes?",),
    "still": ("which shape stays in place?", "which shape does not move?"),
    "scene": ("does the scene stay the same?", "is it the same scene all the time?"),
}


@dataclass(frozen=True)
class QA:
    """One question of one of KINDS and its answer: one to three words, lower case."""

    kind: str
    question: str
    answer: str


@dataclass
class _Facts:
    """What can be seen in the frames of a world."""

    world: World
    seen: list[int]  # actors visible in at least one frame
    first: list[int]  # first visible frame per actor, `frames` when never
    moved: list[float]  # visible travel per actor, canvas units
    tracks: Array  # [actors, frames, 2]
    touch_frame: int  # first frame with the touch, -1 when none shows it


def _facts(world: World) -> _Facts:
    visible, tracks = world.visible(), world.tracks()
    first = [int(v.argmax()) if v.any() else world.frames for v in visible]
    moved = []
    for k, row in enumerate(visible):
        path = tracks[k, row]
        moved.append(float(np.ptp(path, 0).max()) if len(path) else 0.0)
    touch_frame = -1
    if world.touch is not None:
        now = (world.times >= world.touch.begin) & (world.times <= world.touch.end)
        touch_frame = int(now.argmax()) if now.any() else -1
    seen = [k for k in range(len(world.actors)) if first[k] < world.frames]
    return _Facts(world, seen, first, moved, tracks, touch_frame)


def quarter(x: float, y: float) -> str | None:
    """Which quarter of the picture, None near the middle lines."""
    half = CANVAS / 2
    if abs(x - half) < _MARGIN or abs(y - half) < _MARGIN:
        return None
    return f"{'top' if y < half else 'bottom'} {'left' if x < half else 'right'}"


Ask = Callable[..., None]


def _ask_order(facts: _Facts, ask: Ask, rng: np.random.Generator) -> None:
    world, actors = facts.world, facts.world.actors
    times = world.times
    for a in facts.seen:
        for b in facts.seen:
            fa, fb = facts.first[a], facts.first[b]
            if fa < fb and times[fb] - times[fa] >= _APART:
                x, y = actors[a].name, actors[b].name
                if rng.random() < 0.5:
                    x, y = y, x
                ask("order", "first", actors[a].name, x=x, y=y)
    if len(world.plates) != 1:
        return
    sign = world.plates[0].frame

    def relative(event: int, template: str, **names: str) -> None:
        if event > 0 and event != sign and abs(times[event] - times[sign]) >= _APART:
            ask("order", template, "before" if sign < event else "after", **names)

    for k in facts.seen:
        relative(facts.first[k], "sign_shape", x=actors[k].name)
    if world.touch is not None:
        mover, target = actors[world.touch.mover], actors[world.touch.target]
        relative(facts.touch_frame, "sign_touch", x=mover.name, y=target.name)
    after_cut = times >= world.cut
    if after_cut.any():
        relative(int(after_cut.argmax()), "sign_cut")


def _ask_where(facts: _Facts, ask: Ask) -> None:
    world = facts.world
    for k in facts.seen:
        name = world.actors[k].name
        start = quarter(*facts.tracks[k, 0])
        end = quarter(*facts.tracks[k, -1])
        if world.frames == 1:
            if start:
                ask("where", "where_now", start, x=name)
                ask("where", "side_now", start.split()[1], x=name)
            continue
        if start and facts.first[k] == 0:
            ask("where", "where_start", start, x=name)
            ask("where", "side_start", start.split()[1], x=name)
        if end:
            ask("where", "where_end", end, x=name)
            ask("where", "side_end", end.split()[1], x=name)


def _ask_same(facts: _Facts, ask: Ask) -> None:
    world = facts.world
    if world.frames < 2:
        return
    still = [k for k in facts.seen if world.actors[k].motion == STILL]
    movers = [k for k in facts.seen if world.actors[k].motion != STILL]
    if len(still) == 1 and movers and all(facts.moved[k] >= _MOVED for k in movers):
        ask("same", "still", world.actors[still[0]].name)
    has_cut = bool((world.times >= world.cut).any() and (world.times < world.cut).any())
    ask("same", "scene", "no" if has_cut else "yes")


def all_questions(world: World, rng: np.random.Generator) -> list[QA]:
    """Every question that the frames of `world` answer beyond doubt, wording drawn from `rng`."""
    facts = _facts(world)
    out: list[QA] = []

    def ask(kind: str, template: str, answer: str, **names: str) -> None:
        texts = TEMPLATES[template]
        text = texts[int(rng.integers(len(texts)))].format(**names)
        out.append(QA(kind, text, answer))

    if len(world.plates) == 1:
        plate = world.plates[0]
        ask("digit", "digit", str(plate.digit))
        part = part_of(plate.frame, world.frames)
        if world.frames >= 3 and part >= 0:
            ask("part", "part", PARTS[part])
    ask("count", "count", NUMBERS[len(facts.seen)])
    shapes = [world.actors[k].shape for k in facts.seen]
    for k in facts.seen:
        actor = world.actors[k]
        ask("attribute", "shape_of", SHAPES[actor.shape], x=COLOURS[actor.colour])
        if shapes.count(actor.shape) == 1:
            ask("attribute", "colour_of", COLOURS[actor.colour], x=SHAPES[actor.shape])
        if actor.motion not in (STILL, BOUNCED) and facts.moved[k] >= _MOVED:
            ask("direction", "direction", DIRECTIONS[actor.motion], x=actor.name)
    if world.touch is not None and facts.touch_frame >= 0:
        mover, target = world.actors[world.touch.mover], world.actors[world.touch.target]
        ask("touch", "touch", target.name, x=mover.name)
        ask("touch", "touch", mover.name, x=target.name)
    _ask_where(facts, ask)
    _ask_order(facts, ask, rng)
    _ask_same(facts, ask)
    return out


def pick(questions: list[QA], rng: np.random.Generator, each: int, total: int) -> list[QA]:
    """At most `each` questions of a kind and `total` in all, in random order."""
    taken: list[QA] = []
    counts = dict.fromkeys(KINDS, 0)
    for i in rng.permutation(len(questions)):
        qa = questions[int(i)]
        if counts[qa.kind] < each and len(taken) < total:
            counts[qa.kind] += 1
            taken.append(qa)
    return taken
