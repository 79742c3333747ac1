"""What is compared: models, workloads, the programs that run each, and the project's targets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from measure import Runner, last_json
from processor import multiplies_bfloat16
from programs import HERE, Missing, Programs
from shapes import DECODERS


@dataclass(frozen=True)
class Target:
    """One row of the table: the best of `ours` against the best of `peers`.

    `factor`: how many times better ours has to be. `limit_share`: instead, the share of the read
    bandwidth that ours has to reach. `seconds`: instead, the most that ours may take. `part` and
    `most_share`: instead, a figure in seconds that the program prints beside its value, and the
    share of the value that it has to stay below. Names are prefixes of runner names.
    """

    what: str
    ours: tuple[str, ...]
    peers: tuple[str, ...] = ()
    factor: float | None = None
    limit_share: float | None = None
    seconds: float | None = None
    part: str = ""
    most_share: float | None = None


@dataclass
class Bench:
    """Programs whose samples alternate, and the rows they make."""

    name: str
    title: str
    unit: str
    targets: list[Target]
    higher_is_better: bool = True
    ours: list[Runner] = field(default_factory=list)
    peers: list[Runner] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    _added: list[tuple[str, Callable[[], Runner]]] = field(default_factory=list)

    def add(self, kind: str, make: Callable[[], Runner]) -> None:
        """Notes what makes a runner: its models take minutes and gigabytes, so not yet."""
        self._added.append((kind, make))

    def prepare(self) -> None:
        """Makes the runners, with their models; what cannot be had is listed instead."""
        for kind, make in self._added:
            try:
                (self.ours if kind == "ours" else self.peers).append(make())
            except Missing as reason:
                self.missing.append(str(reason))
        self._added.clear()


SIZES = {
    "qwen2-0.5b": "0.5B",
    "qwen2-7b": "7B",
    "qwen2-7b-4l": "7B (4 of 28 layers)",
    "smollm2-135m": "135M",
}
# Types that llama.cpp is given for 4 bits; SmolLM2 is published as Q4_1.
FOUR_BITS = {
    "qwen2-0.5b": ("q4_0", "q4_k_m"),
    "qwen2-7b": ("q4_0",),
    "qwen2-7b-4l": ("q4_0",),
    "qwen2-7b-28l": ("q4_0", "q4_k_m"),
    "smollm2-135m": ("q4_0", "q4_1"),
}
FRAME_ROWS = 210  # of LLaVA-Video: 14 x 14 after pooling, and a newline per grid row
VIDEO_FRAMES = 32
VIDEO_PROMPT = 40  # text tokens around them


def _engine(
    p: Programs, label: str, name: str, weights: str, mode: str, **options: object
) -> Callable[[], Runner]:
    return lambda: p.engine(label, p.ours(name, weights), mode, **options)


# The 7B's long prompts would take too long whole, for peers above all: seconds of 28 layers are
# taken from models of 4 and of 1, on both sides.
PARTS = {"qwen2-7b-28l": ("qwen2-7b-4l", "qwen2-7b-1l")}
FROM_PARTS = "7B (from 4 and 1 of 28 layers)"


def _whole(name: str, make: Callable[[str], Runner]) -> Callable[[], Runner]:
    """make(name), or what its PARTS tell of it."""
    if name not in PARTS:
        return lambda: make(name)
    own, shallow = PARTS[name]
    layers = tuple(DECODERS[part].layers for part in (shallow, own, name))
    return lambda: replace(make(own), shallow=make(shallow), layers=layers)


def _parts(
    p: Programs, label: str, name: str, weights: str, mode: str, **options: object
) -> Callable[[], Runner]:
    return _whole(name, lambda model: _engine(p, label, model, weights, mode, **options)())


def prefill(p: Programs, name: str, tokens: int) -> Bench:
    """A prompt of `tokens` tokens up to the first new token."""
    bench = Bench(
        f"prefill-{name}-{tokens}",
        f"prefill {tokens}, {FROM_PARTS if name in PARTS else SIZES[name]}",
        "tok/s",
        [
            Target("4 bit, against llama.cpp's best 4 bit", ("w4",), ("llama.cpp",), 2.5),
            Target("against CTranslate2 int8", ("w4", "w8"), ("CTranslate2",), 1.5),
        ],
    )
    formats = [("w4g128", "a8", "kv16"), ("w4g128", "a8", "kv8"), ("w4g128", "a16", "kv16")]
    if name == "qwen2-0.5b":
        formats.append(("w8g128", "a8", "kv16"))
    for weights, activations, kv in formats:
        label = f"{weights} {activations}" + ("" if kv == "kv16" else f" {kv}")
        options = {"prompt": tokens, "activations": activations, "kv": kv}
        options |= {"less": {"prompt": 32}, "work": tokens - 32}
        bench.add("ours", _parts(p, label, name, weights, "prefill", **options))

    def llama(label: str, kind: str, **options: object) -> None:
        def make(model: str) -> Runner:
            return p.llama_bench(
                f"llama.cpp {label}", p.gguf(model, kind), {"p": 32}, tokens - 32,
                p=tokens, n=0, **options,
            )  # fmt: skip

        bench.add("peer", _whole(name, make))

    for kind in FOUR_BITS[name]:
        llama(kind, kind)
    # As the preset `fast` has it: the cache in 8 bits.
    llama("q4_0 kv q8_0", "q4_0", fa="on", ctk="q8_0", ctv="q8_0")

    def ct2(model: str) -> Runner:
        command = ["ct2", p.ct2(model), "int8_float32", "prefill"]
        return p.worker(
            "CTranslate2 int8", *command, str(tokens), less=[*command, "32"], work=tokens - 32
        )

    bench.add("peer", _whole(name, ct2))
    return bench


def decode(p: Programs, name: str, weights: str, tokens: int) -> Bench:
    """One sequence after 128 prompt tokens."""
    bits = 4 if weights.startswith("w4") else 8
    bench = Bench(
        f"decode-{name}-{bits}bit",
        f"decode, batch 1, {SIZES[name]}, {bits} bit",
        "tok/s",
        [
            Target("share of the read bandwidth", (weights,), limit_share=0.85),
            Target("against llama.cpp at equal bits", (weights,), ("llama.cpp",), 1.2),
        ],
    )
    for activations in ("a8", "a16"):
        options = {"prompt": 128, "tokens": tokens, "activations": activations, "kv": "kv16"}
        options |= {"less": {"tokens": tokens // 4}, "work": tokens - tokens // 4}
        label = f"{weights} {activations}"
        bench.add("ours", _engine(p, label, name, weights, "decode", **options))
    for kind in FOUR_BITS[name][:1] if bits == 4 else ("q8_0",):
        bench.add(
            "peer",
            lambda kind=kind: p.llama_bench(
                f"llama.cpp {kind}",
                p.gguf(name, kind),
                {"n": tokens // 4},
                tokens - tokens // 4,
                p=0,
                n=tokens,
                d=128,
            ),
        )
    return bench


def batch(p: Programs, name: str, tokens: int, count: int = 8) -> Bench:
    """Several sequences at once after 128 prompt tokens each; the total rate."""
    bench = Bench(
        f"batch{count}-{name}",
        f"decode, batch {count}, {SIZES[name]}, 4 bit",
        "tok/s",
        [Target("against llama.cpp", ("w4g128",), ("llama.cpp",), 2.0)],
    )
    for activations in ("a8", "a16"):
        options = {"prompt": 128, "tokens": tokens, "batch": count, "kv": "kv16"}
        options |= {"activations": activations, "less": {"tokens": tokens // 4}}
        options["work"] = count * (tokens - tokens // 4)
        label = f"w4g128 {activations}"
        bench.add("ours", _engine(p, label, name, "w4g128", "decode", **options))
    for kind in FOUR_BITS[name][:1]:
        bench.add(
            "peer",
            lambda kind=kind: p.llama_batch(
                f"llama.cpp {kind}", p.gguf(name, kind), 128, tokens, tokens // 4, count
            ),
        )
    return bench


def imported(p: Programs, name: str, kind: str, tokens: int) -> list[Bench]:
    """A GGUF file as it comes, its codes kept, against llama.cpp with the same file."""
    what = f"{SIZES[name]}, GGUF {kind.upper()} as it comes"
    llama = f"llama.cpp {kind}"

    def bench(work: str, title: str, factor: float, peer: Callable[[], Runner]) -> Bench:
        target = Target("against llama.cpp with the same file", (f"{kind} a8",), (llama,), factor)
        made = Bench(f"import-{work}-{name}-{kind}", f"{title}, {what}", "tok/s", [target])
        for activations in ("a8", "a16"):
            options: dict[str, object] = {"prompt": 512, "activations": activations, "kv": "kv16"}
            less: dict[str, object] = {"prompt": 32}
            of_work = 480
            if work != "prefill":
                count = 8 if work == "batch8" else 1
                options |= {"prompt": 128, "tokens": tokens, "batch": count}
                less = {"tokens": tokens // 4}
                of_work = count * (tokens - tokens // 4)
            options |= {"less": less, "work": of_work}
            mode = "prefill" if work == "prefill" else "decode"
            made.add(
                "ours",
                lambda a=activations, m=mode, o=options: p.engine(
                    f"{kind} {a}", p.imported(name, kind), m, **o
                ),
            )
        made.add("peer", peer)
        return made

    def single(few: dict[str, object], work: float, **options: object) -> Callable[[], Runner]:
        return lambda: p.llama_bench(llama, p.gguf(name, kind), few, work, **options)

    def eight() -> Runner:
        return p.llama_batch(llama, p.gguf(name, kind), 128, tokens, tokens // 4, 8)

    rest = tokens - tokens // 4
    return [
        bench("prefill", "prefill 512", 2.5, single({"p": 32}, 480, p=512, n=0)),
        bench("decode", "decode, batch 1", 1.2,
              single({"n": tokens // 4}, rest, p=0, n=tokens, d=128)),
        bench("batch8", "decode, batch 8", 2.0, eight),
    ]  # fmt: skip


def context(p: Programs, name: str, depth: int, tokens: int) -> Bench:
    """One sequence deep in a long context, for each type of KV cache."""
    kv_types = {"kv16": "f16", "kv8": "q8_0", "kv4": "q4_0"}
    bench = Bench(
        f"context{depth}-{name}",
        f"decode at context {depth}, {SIZES[name]}, 4 bit",
        "tok/s",
        [
            Target("kv16, against llama.cpp f16", ("kv16",), ("llama.cpp kv f16",), 2.0),
            Target("kv8, against llama.cpp q8_0", ("kv8",), ("llama.cpp kv q8_0",), 2.0),
            Target("kv4, against llama.cpp q4_0", ("kv4",), ("llama.cpp kv q4_0",), 2.0),
            Target("kv8, against our kv16", ("kv8",), ("kv16",), 1.0),
            Target("kv4, against our kv8", ("kv4",), ("kv8",), 1.0),
        ],
    )
    for kv, peer in kv_types.items():
        options = {"prompt": depth, "tokens": tokens, "activations": "a8", "kv": kv}
        options |= {"less": {"tokens": tokens // 4}, "work": tokens - tokens // 4}
        bench.add("ours", _engine(p, f"{kv} a8", name, "w4g128", "decode", **options))
        bench.add(
            "peer",
            lambda peer=peer: p.llama_bench(
                f"llama.cpp kv {peer}", p.gguf(name, "q4_0"),
                {"n": tokens // 4}, tokens - tokens // 4,
                p=0, n=tokens, d=depth, fa="on", ctk=peer, ctv=peer,
            ),
        )  # fmt: skip
    return bench


def tower(p: Programs) -> Bench:
    """The vision tower, one frame of 729 patches."""
    bench = Bench(
        "tower",
        "vision tower (27 layers, 729 patches)",
        "s/frame",
        [
            Target("float, against the best float32", ("f32",), ("onnxruntime f32", "torch f32"),
                   1.15),
            Target("bfloat16 products, against the best float32 and bfloat16", ("bf16 abf16",),
                   ("onnxruntime f32", "torch f32", "torch bf16"), 1.15),
            Target("W8A8, attention in float32, against the best int8", ("w8g128 a8 float",),
                   ("onnxruntime int8",), 1.15),
            Target("W8A8, attention too, against the best int8", ("w8g128 a8 attention",),
                   ("onnxruntime int8",), 1.15),
            Target("W4A8, attention in float32, against the best int8", ("w4g128 a8 float",),
                   ("onnxruntime int8",), 1.7),
            Target("W4A8, attention too, against the best int8", ("w4g128 a8 attention",),
                   ("onnxruntime int8",), 1.7),
        ],
        higher_is_better=False,
    )  # fmt: skip
    formats = [("f32", "a16", ""), ("bf16", "abf16", "")]
    for weights in ("w8g128", "w4g128"):
        formats += [(weights, "a8", " float attention"), (weights, "a8", " attention a8")]
    for weights, activations, attention in formats:
        asked = activations + (",attention=a8" if attention.endswith("a8") else "")
        options = {"frames": 2, "prompt": 8, "tokens": 2, "activations": asked}
        options |= {"less": {"frames": 1}, "work": 1, "rate": False}
        label = f"{weights} {activations}{attention}"
        bench.add("ours", _engine(p, label, "siglip", weights, "vision", **options))

    def peer(label: str, *command: str | Path) -> Runner:
        return p.worker(label, *command, "1", less=[*command, "0"], work=1, rate=False)

    bench.add("peer", lambda: peer("onnxruntime f32", "ort", p.onnx(False)))
    bench.add("peer", lambda: peer("onnxruntime int8", "ort", p.onnx(True)))
    bench.add("peer", lambda: peer("torch f32", "torch-tower", "float32"))

    def torch_bf16() -> Runner:
        if not multiplies_bfloat16():
            raise Missing("torch bf16: a minute a frame without bfloat16 products")
        return peer("torch bf16", "torch-tower", "bfloat16")

    bench.add("peer", torch_bf16)
    return bench


def fusion(p: Programs, frames: int, activations: str) -> Bench:
    """Token reduction at cost 0.3 against the same prompt without it: seconds to the first token.

    The paper's prompt: 64 frames of 210 rows. Half of a frame's rows continue the frame before.
    With reduction, where layers differ, all of them run.
    """
    bench = Bench(
        "fusion-28l",
        f"prefill of {frames * FRAME_ROWS} visual rows, 7B, {activations}",
        "s",
        [
            Target(
                "FrameFusion at cost 0.3, against no reduction", ("cost 0.3",), ("cost 1",), 3.4
            ),
            Target(
                "overhead: the stage itself", ("cost 0.3",), part="reduction_s", most_share=0.01
            ),
        ],
        higher_is_better=False,
    )
    for cost in (0.3, 1.0):
        options = {"frames": frames, "prompt": 40, "tokens": 2, "cost": cost}
        options |= {"activations": activations, "kv": "kv8", "memory_mib": 4096}
        # One frame more or less is nothing beside 64: the whole prompt is what is compared.
        options |= {"less": {"frames": 2, "cost": 1.0}, "work": 1, "rate": False}
        bench.add("ours", _with_cost(p, cost, options))
    return bench


def _with_cost(p: Programs, cost: float, options: dict[str, object]) -> Callable[[], Runner]:
    """The 7B; whole with reduction, from its parts without."""
    make = _parts if cost == 1.0 else _engine
    return make(p, f"cost {cost:g}", "qwen2-7b-28l", "w4g128", "rows", **options)


def video(p: Programs, activations: str) -> list[Bench]:
    """The parts of a question about 32 frames; report.py adds them up. No targets of their own."""
    name, rows = "qwen2-7b-28l", VIDEO_FRAMES * FRAME_ROWS + VIDEO_PROMPT
    script = Path(__file__).with_name("frames_worker.py")
    python = str(HERE.parents[1] / "python")
    decoding = Bench("video-frames", f"decode and resize {VIDEO_FRAMES} frames", "s", [],
                     higher_is_better=False)  # fmt: skip
    command = (sys.executable, str(script), str(VIDEO_FRAMES))
    decoding.add("ours", lambda: Runner("PyAV", command, last_json, (("PYTHONPATH", python),)))
    projector = Bench("video-projector", "projector and pooling of a frame", "s/frame", [],
                      higher_is_better=False)  # fmt: skip
    options = {"frames": 1, "activations": activations}  # as many as the engine takes at once
    label = f"w4g128 {activations}"
    projector.add("ours", _engine(p, label, "llava-video-1l", "w4g128", "projector", **options))
    tower = Bench("video-tower", "llama.cpp's tower, 26 layers, a small projector", "s/frame", [],
                  higher_is_better=False)  # fmt: skip
    for kind in ("f16", "q8_0", "q4_0"):
        tower.add("peer", lambda kind=kind: p.llama_tower(kind))
    language = Bench("video-llm-28l", f"{rows} rows, then 64 tokens, 7B", "s", [],
                     higher_is_better=False)  # fmt: skip
    for cost in (1.0, 0.3):
        options = {"frames": VIDEO_FRAMES, "prompt": VIDEO_PROMPT, "tokens": 64, "cost": cost}
        options |= {"activations": activations, "kv": "kv8", "memory_mib": 4096, "rate": False}
        language.add("ours", _with_cost(p, cost, options))

    def llama(label: str, **options: int) -> None:
        def make(model: str) -> Runner:
            return p.llama_bench(f"llama.cpp {label}", p.gguf(model, "q4_0"), **options)

        language.add("peer", _whole(name, make))

    llama("prefill", p=rows, n=0)
    llama("decode", p=0, n=16, d=rows)
    return [decoding, tower, projector, language]


def load(p: Programs) -> Bench:
    """Opening a model of 4 GB whose files are in the page cache, until requests are accepted."""
    bench = Bench(
        "load",
        "load, 7B, 4 bit, files in the page cache",
        "s",
        [Target("seconds", ("w4g128",), seconds=1.0)],
        higher_is_better=False,
    )
    bench.add("ours", _engine(p, "w4g128", "qwen2-7b", "w4g128", "load"))
    return bench


def all_benches(p: Programs, quick: bool, activations: str) -> list[Bench]:
    """Every bench, the small models first; `quick` leaves out what takes minutes.

    `activations` is for the long workloads, which are not run with both.
    """
    prompts = (512,) if quick else (512, 2048)
    result = [prefill(p, name, n) for name in ("qwen2-0.5b", "smollm2-135m") for n in prompts]
    result += [prefill(p, "qwen2-7b-28l", n) for n in prompts]
    result += [decode(p, name, "w4g128", 64) for name in ("qwen2-0.5b", "smollm2-135m")]
    result += [decode(p, "qwen2-0.5b", "w8g128", 64)]
    result += [batch(p, name, 48) for name in ("qwen2-0.5b", "smollm2-135m")]
    result += imported(p, "smollm2-135m", "q4_1", 48)
    result += [context(p, "qwen2-0.5b", 1024 if quick else 4096, 32), tower(p)]
    if not quick:
        result += [decode(p, "qwen2-7b", "w4g128", 16), load(p), batch(p, "qwen2-7b-4l", 48)]
        result += imported(p, "qwen2-7b-4l", "q4_k_m", 48)
        result += [fusion(p, 64, activations), *video(p, activations)]
    return result


def tiny_benches(p: Programs) -> list[Bench]:
    """A few benches on toy models: whether the harness works, nothing about speed."""
    options = {"prompt": 32, "activations": "a16", "kv": "kv8"}
    prompt = Bench("prefill-tiny", "prefill 32, toy", "tok/s", [Target("none", ("w4g128",))])
    prompt.add("ours", _engine(p, "w4g128 a16", "tiny", "w4g128", "prefill", **options))
    steps = Bench(
        "decode-tiny",
        "decode, batch 2, toy",
        "tok/s",
        [Target("share of the read bandwidth", ("w4g128",), limit_share=0.85)],
    )
    options |= {"tokens": 8, "batch": 2}
    steps.add("ours", _engine(p, "w4g128 a16", "tiny", "w4g128", "decode", **options))
    frames = Bench(
        "tower-tiny", "tower, toy", "s/frame", [Target("none", ("f32",))], higher_is_better=False
    )
    options = {"frames": 2, "prompt": 8, "tokens": 2, "cost": 0.5}
    frames.add("ours", _engine(p, "f32 a16", "tiny-video", "f32", "vision", **options))
    projector = Bench("projector-tiny", "projector, toy", "s/frame", [], higher_is_better=False)
    options = {"frames": 2, "activations": "a16"}
    projector.add("ours", _engine(p, "f32 a16", "tiny-video", "f32", "projector", **options))
    loaded = Bench(
        "load-tiny", "load, toy", "s", [Target("seconds", ("w4g128",), seconds=1.0)],
        higher_is_better=False,
    )  # fmt: skip
    loaded.add("ours", _engine(p, "w4g128", "tiny", "w4g128", "load"))
    return [prompt, steps, frames, projector, loaded]
