"""The video generator: determinism, held-out seeds, answers checked against the pixels."""

from __future__ import annotations

import numpy as np
import pytest

from framequilt.demo.lm_data import LM_SEED_BASE, things
from framequilt.demo.questions import NUMBERS, TEMPLATES, quarter
from framequilt.demo.render import render_with_mask
from framequilt.demo.scenes import HELD_OUT_END, KINDS, Scene, make_scene, make_world
from framequilt.demo.tower_train import TRAIN_SEED_BASE
from framequilt.demo.world import COLOUR_RGB, COLOURS, SHAPES

SIZE = 128


def colour_pixels(picture: np.ndarray, colour: str) -> np.ndarray:
    """[n, 2] x, y in canvas units of pixels whose hue is near a named colour's."""
    rgb = picture.astype(np.float64)
    strong = rgb.max(-1) - rgb.min(-1) > 70
    unit = rgb - rgb.mean(-1, keepdims=True)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True) + 1e-9
    wanted = np.array([np.array(c) - np.mean(c) for c in COLOUR_RGB], np.float64)
    wanted /= np.linalg.norm(wanted, axis=-1, keepdims=True)
    nearest = (unit @ wanted.T).argmax(-1)
    y, x = np.nonzero(strong & (nearest == COLOURS.index(colour)))
    return np.stack([x, y], 1) * (64 / picture.shape[1])


def sees(picture: np.ndarray, colour: str) -> bool:
    return len(colour_pixels(picture, colour)) > 40 * (picture.shape[1] / 64) ** 2


def questions_of(kind: str, seeds: range, frames: int) -> list[tuple[Scene, str, str]]:
    out = []
    for seed in seeds:
        scene = make_scene(seed, frames, SIZE)
        out += [(scene, q.question, q.answer) for q in scene.questions if q.kind == kind]
    assert len(out) >= 5
    return out


def named_colour(text: str) -> str:
    return next(c for c in COLOURS if f" {c}" in text)


def test_a_seed_fixes_the_video_and_its_questions() -> None:
    first, again, other = make_scene(11, 8), make_scene(11, 8), make_scene(12, 8)
    assert np.array_equal(first.frames, again.frames)
    assert first.questions == again.questions
    assert not np.array_equal(first.frames, other.frames)


def test_the_content_does_not_depend_on_the_size() -> None:
    small, large = make_scene(11, 8, 64), make_scene(11, 8, 256)
    assert small.questions == large.questions
    shrunk = large.frames.reshape(8, 64, 4, 64, 4, 3).mean((2, 4))
    assert np.abs(shrunk - small.frames).mean() < 12


def test_held_out_seeds_are_never_trained_on() -> None:
    assert HELD_OUT_END <= TRAIN_SEED_BASE < LM_SEED_BASE


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="frames 0"):
        make_scene(1, 0)


def test_every_kind_is_asked_with_many_answers() -> None:
    answers: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for seed in range(400):
        for q in make_world(seed, 32)[1]:
            answers[q.kind].add(q.answer)
            assert 1 <= len(q.answer.split()) <= 3
            assert q.answer == q.answer.lower()
    wanted = {"digit": 10, "part": 3, "direction": 4, "count": 4, "where": 4}
    for kind in KINDS:
        assert len(answers[kind]) >= wanted.get(kind, 10), kind
    assert set(TEMPLATES) >= {"digit", "part", "direction"}


def test_the_sign_is_seen_in_the_named_part() -> None:
    right = asked = 0
    for scene, _, answer in questions_of("part", range(100, 130), 12):
        white = np.array([(p.min(-1) > 205).sum() for p in scene.frames.astype(np.int64)])
        jump = np.abs(np.diff(white, prepend=white[1])) + np.abs(np.diff(white, append=white[-2]))
        shown = int(jump.argmax())  # a sign is white in one frame; a cut changes the rest for good
        part = ("beginning", "middle", "end")[int((shown + 0.5) / 12 * 3)]
        right += part == answer
        asked += 1
    assert right >= 0.9 * asked


def test_directions_agree_with_tracked_pixels() -> None:
    checked = 0
    for scene, question, answer in questions_of("direction", range(200, 230), 10):
        colour = named_colour(question)
        seen = [p for p in scene.frames if sees(p, colour)]
        if len(seen) < 6:
            continue
        first, last = (np.median(colour_pixels(p, colour), 0) for p in (seen[0], seen[-1]))
        x, y = last - first
        way = ("left", "right")[int(x > 0)] if abs(x) > abs(y) else ("up", "down")[int(y > 0)]
        assert way == answer, (scene.seed, question)
        checked += 1
    assert checked >= 5


def test_quarters_agree_with_pixels() -> None:
    for scene, question, answer in questions_of("where", range(300, 330), 4):
        picture = scene.frames[-1] if "end" in question else scene.frames[0]
        colour = named_colour(question)
        if sees(picture, colour):
            x, y = np.median(colour_pixels(picture, colour), 0)
            found = quarter(x, y)
            assert found is None or answer in found, (scene.seed, question)


def test_counts_agree_with_colours_seen() -> None:
    right = asked = 0
    for scene, _, answer in questions_of("count", range(400, 425), 6):
        found = [c for c in COLOURS if any(sees(p, c) for p in scene.frames)]
        right += NUMBERS[len(found)] == answer
        asked += 1
    assert right >= 0.9 * asked  # a background may hide a hue from this simple reader


def test_touching_shapes_come_close_and_others_do_not() -> None:
    touching = 0
    for seed in range(500, 700):
        world, _ = make_world(seed, 32)
        tracks = world.tracks()
        pair = {world.touch.mover, world.touch.target} if world.touch else set()
        for a in range(len(world.actors)):
            for b in range(a):
                gap = np.hypot(*(tracks[a] - tracks[b]).T).min()
                reach = world.actors[a].radius + world.actors[b].radius
                assert (gap < reach) == ({a, b} == pair), seed
                touching += {a, b} == pair
    assert touching > 50


def test_what_stays_in_place_does_not_move_and_everything_else_does() -> None:
    asked = 0
    for seed in range(700, 900):
        world, questions = make_world(seed, 32)
        for q in questions:
            if q.kind == "same" and q.answer not in ("yes", "no"):
                pairs = zip(world.actors, world.tracks(), strict=True)
                travel = {a.name: np.ptp(t, 0).max() for a, t in pairs}
                assert travel.pop(q.answer) == 0
                assert min(travel.values()) > 5
                asked += 1
            if q.kind == "order" and " or the " in q.question and "sign" not in q.question:
                start = {a.name: a.appears for a in world.actors}
                names = [n for n in start if n in q.question]
                assert min(names, key=lambda n: start[n]) == q.answer
    assert asked > 10


def test_shape_names_are_the_shapes_drawn() -> None:
    ratios: dict[str, list[float]] = {s: [] for s in SHAPES}
    for seed in range(900, 960):
        world, _ = make_world(seed, 1)
        scene = make_scene(seed, 1, SIZE)
        if len(world.actors) == 1 and not world.plates:
            points = colour_pixels(scene.frames[0], COLOURS[world.actors[0].colour])
            box = np.ptp(points, 0).prod()
            area = len(points) * (64 / SIZE) ** 2
            ratios[SHAPES[world.actors[0].shape]].append(area / box)
    for seed in range(960, 2000):
        if all(ratios.values()):
            break
        world, _ = make_world(seed, 1)
        if len(world.actors) == 1:
            points = colour_pixels(
                make_scene(seed, 1, SIZE).frames[0], COLOURS[world.actors[0].colour]
            )
            box = np.ptp(points, 0).prod()
            area = len(points) * (64 / SIZE) ** 2
            ratios[SHAPES[world.actors[0].shape]].append(area / box)
    fill = {shape: float(np.median(values)) for shape, values in ratios.items()}
    assert fill["square"] > fill["circle"] > fill["triangle"]
    assert fill["circle"] > fill["cross"]


def test_cells_with_something_in_them_are_those_whose_pixels_differ_from_the_background() -> None:
    agree = total = 0
    for seed in range(20):
        world = make_world(seed, 8)[0]
        picture, mask = render_with_mask(world, SIZE)
        found = things(world, mask, 4)
        for actor in world.actors:
            actor.appears = 2.0  # never; everything else is drawn the same
        world.plates.clear()
        empty = render_with_mask(world, SIZE)[0]
        differs = np.abs(picture.astype(int) - empty.astype(int)).max(-1) > 25
        share = differs.reshape(8, 4, SIZE // 4, 4, SIZE // 4).mean((2, 4))
        sure = (share > 0.2) | (share < 0.02)
        agree += int(((share > 0.1) == (found > 0))[sure].sum())
        total += int(sure.sum())
    assert agree / total > 0.97
