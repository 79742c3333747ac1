"""Video and image input: decoding, frame selection, preprocessing to float32 tensors.

`frames` decodes (PyAV only when a file must be decoded), `selection` says which frames a policy
takes, `processors` turns pictures into what a vision tower reads. All functions are pure or own
what they open; any thread.
"""

from framequilt.vision.frames import ClipInfo, Frames, VideoSource, load_frames, probe
from framequilt.vision.processors import ImageTensors, Preprocessor, load_image
from framequilt.vision.selection import Selection, select_centres, select_fps, select_uniform

__all__ = [
    "ClipInfo",
    "Frames",
    "ImageTensors",
    "Preprocessor",
    "Selection",
    "VideoSource",
    "load_frames",
    "load_image",
    "probe",
    "select_centres",
    "select_fps",
    "select_uniform",
]
