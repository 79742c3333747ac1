"""Writes a generated video as MP4 (H.264) with its questions and answers as JSON beside it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from framequilt.demo.scenes import make_scene


def write_mp4(path: Path, frames: npt.NDArray[np.uint8], fps: int = 8, crf: int = 18) -> None:
    """Encodes uint8 [frames, height, width, 3] RGB with even sizes."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf)})
        stream.width, stream.height = frames.shape[2], frames.shape[1]
        stream.pix_fmt = "yuv420p"
        for picture in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def read_mp4(path: Path) -> npt.NDArray[np.uint8]:
    """Decodes every frame, uint8 [frames, height, width, 3] RGB."""
    import av

    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def resize_frames(frames: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Bicubic resize to size x size, as the SigLIP preprocessor does."""
    from PIL import Image

    method = Image.Resampling.BICUBIC
    return np.stack([np.asarray(Image.fromarray(f).resize((size, size), method)) for f in frames])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="clip.mp4; clip.json lies beside")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--size", type=int, default=256, help="pixels per side, even")
    parser.add_argument("--fps", type=int, default=8)
    args = parser.parse_args()
    scene = make_scene(args.seed, args.frames, args.size)
    write_mp4(args.out, scene.frames, args.fps)
    listing = {
        "seed": args.seed,
        "frames": args.frames,
        "fps": args.fps,
        "questions": [vars(q) for q in scene.questions],
    }
    side = args.out.with_suffix(".json")
    side.write_text(json.dumps(listing, indent=2) + "\n", encoding="utf-8")
    for q in scene.questions:
        print(f"{q.kind:10s} {q.question}  ->  {q.answer}")


if __name__ == "__main__":
    main()
