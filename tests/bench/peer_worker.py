"""One sample of a peer that is a Python package, in a process of its own. Prints one JSON object.

    peer_worker.py ct2 DIRECTORY COMPUTE_TYPE prefill TOKENS
    peer_worker.py ct2 DIRECTORY COMPUTE_TYPE decode PROMPT TOKENS BATCH
    peer_worker.py ort MODEL.onnx FRAMES
    peer_worker.py ort-quantize MODEL.onnx MODEL.int8.onnx
    peer_worker.py torch-tower float32|bfloat16 FRAMES
    peer_worker.py mtmd PROGRAM MODEL.gguf MMPROJ.gguf

Runs in the peers' own environment: nothing of Framequilt is imported. A warm-up comes first. A
decode rate is the tokens after the first one over the time they took: generation of all minus
generation of one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = int(os.environ.get("BENCH_THREADS", "2"))
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))

import numpy as np  # noqa: E402 (thread counts are read at import)


def emit(value: float, unit: str) -> None:
    """The result."""
    print(json.dumps({"value": value, "unit": unit}))


def tokens(batch: int, count: int, seed: int) -> list[list[str]]:
    """Random prompts of the word-level tokenizer that models.py writes."""
    ids = np.random.default_rng(seed).integers(3, 30000, (batch, count))
    return [[f"t{i}" for i in row] for row in ids]


def ctranslate2(directory: str, compute_type: str, mode: str, numbers: list[int]) -> None:
    """CTranslate2's generator."""
    import ctranslate2

    generator = ctranslate2.Generator(
        directory, device="cpu", compute_type=compute_type, intra_threads=THREADS, inter_threads=1
    )

    def generate(prompts: list[list[str]], count: int) -> float:
        start = time.perf_counter()
        results = generator.generate_batch(
            prompts, max_length=count, min_length=count, include_prompt_in_result=False,
            sampling_topk=1, max_batch_size=0,
        )  # fmt: skip
        elapsed = time.perf_counter() - start
        assert all(len(result.sequences_ids[0]) == count for result in results)
        return elapsed

    generate(tokens(1, 32, 1), 4)
    if mode == "prefill":
        if os.environ.get("BENCH_WARM_UP") == "full":
            generate(tokens(1, numbers[0], 4), 1)
        emit(numbers[0] / generate(tokens(1, numbers[0], 2), 1), "tok/s")
    else:
        prompt, count, batch = numbers
        prompts = tokens(batch, prompt, 3)
        first = generate(prompts, 1)
        emit(batch * (count - 1) / (generate(prompts, count) - first), "tok/s")


def timed(run: Any, frames: int) -> None:
    """Seconds of a call, of `frames` calls after the first."""
    run()
    start = time.perf_counter()
    for _ in range(frames):
        run()
    emit((time.perf_counter() - start) / max(frames, 1), "s/frame")


def onnxruntime(path: str, frames: int) -> None:
    """The tower in onnxruntime, one frame a call."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    shape = session.get_inputs()[0].shape
    frame = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    timed(lambda: session.run(None, {"pixel_values": frame}), frames)


def quantize(path: str, out: str) -> None:
    """Dynamic int8 per output channel, as onnxruntime offers it."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        path, out, weight_type=QuantType.QInt8, per_channel=True,
        op_types_to_quantize=["MatMul", "Gemm"], use_external_data_format=True,
    )  # fmt: skip


def torch_tower(dtype: str, frames: int) -> None:
    """The tower in transformers, random weights."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.set_num_threads(THREADS)
    config = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=27, num_attention_heads=16,
        image_size=384, patch_size=14, vision_use_head=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = SiglipVisionModel(config)
    model = model.to_empty(device="cpu").to(getattr(torch, dtype)).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.uniform_(-0.03, 0.03)
            elif name.endswith("position_ids"):
                tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape))
    frame = torch.randn(1, 3, 384, 384).to(getattr(torch, dtype))

    def run() -> None:
        with torch.inference_mode():
            model(frame)

    timed(run, frames)


def mtmd(program: str, model: str, mmproj: str) -> None:
    """The tower and projector in llama.cpp: the second of two frames, encoded one by one."""
    with tempfile.TemporaryDirectory() as folder:
        frame = Path(folder) / "frame.ppm"
        pixels = np.random.default_rng(0).integers(0, 256, 384 * 384 * 3, dtype=np.uint8)
        frame.write_bytes(b"P6 384 384 255\n" + pixels.tobytes())
        command = [program, "-m", model, "--mmproj", mmproj, "-t", str(THREADS), "-c", "4096"]
        command += ["--image", str(frame), "--image", str(frame), "-n", "1"]
        command += ["-p", "<__media__> and <__media__> again"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    frames = re.findall(r"encoding mtmd batch, n_chunks = (\d+)", said)
    milliseconds = re.findall(r"batch encoding done in (\d+) ms", said)
    if done.returncode or frames != ["1", "1"] or len(milliseconds) != 2:
        sys.exit(f"{program} did not encode two frames: {said[-300:]}")
    emit(1e-3 * int(milliseconds[1]), "s/frame")


def main(arguments: list[str]) -> None:
    """Runs one of the commands of the module's text."""
    kind, rest = arguments[0], arguments[1:]
    if kind == "ct2":
        ctranslate2(rest[0], rest[1], rest[2], [int(text) for text in rest[3:]])
    elif kind == "ort":
        onnxruntime(rest[0], int(rest[1]))
    elif kind == "ort-quantize":
        quantize(rest[0], rest[1])
    elif kind == "mtmd":
        mtmd(*rest)
    elif kind == "torch-tower":
        torch_tower(rest[0], int(rest[1]))
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
