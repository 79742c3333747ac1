"""Seconds to pick, decode and resize frames of a real clip for a 384 px tower; one JSON object.

python frames_worker.py FRAMES
"""

from __future__ import annotations

import json
import sys
import time

from models import PREPROCESSOR

from framequilt.resources import real_clip
from framequilt.vision import Preprocessor


def main(frames: int) -> None:
    """Once to warm up, once measured."""
    preprocessor = Preprocessor.from_record(PREPROCESSOR, 14)
    clip = str(real_clip())
    for _ in range(2):
        start = time.perf_counter()
        picked = preprocessor.video(clip, frames=frames, policy="uniform")
        elapsed = time.perf_counter() - start
    assert len(picked) == frames
    print(json.dumps({"value": elapsed, "unit": "s", "clip": "1280x720 h264"}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
