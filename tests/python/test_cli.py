"""The command line over a scripted engine: output, JSON, exit codes, the conversation loop."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from framequilt import _native, errors
from framequilt import engine as engine_module
from framequilt.chat import parse_messages
from framequilt.cli.app import app
from framequilt.results import GenerationResult, ReductionReport, StreamPiece, Timings, Usage
from framequilt.vision import Preprocessor

USAGE = Usage(
    prompt_tokens=30,
    completion_tokens=3,
    visual_tokens=20,
    frames=5,
    frames_encoded=3,
    kept_per_layer=(30, 16),
    visual_per_layer=(20, 6),
    kv_bytes=1536,
    kv_bytes_unreduced=4096,
    timings=Timings(vision_ms=100, prefill_ms=200, decode_ms=50, total_ms=360),
    reduction=ReductionReport(stage="framefusion", mean_kept_share=0.31),
)


class FakeStream:
    """Says two words; `script` may hold an exception to raise in between."""

    def __init__(self, script=None):
        self.script = list(script or ["Hello", " world"])
        self.said = []
        self.cancelled = False
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.closed = True

    def __iter__(self):
        while self.script:
            step = self.script.pop(0)
            if isinstance(step, BaseException):
                raise step
            if self.cancelled:
                return
            self.said.append(step)
            yield StreamPiece(step, 1)

    @property
    def text(self):
        return "".join(self.said)

    def cancel(self):
        self.cancelled = True

    def result(self):
        for _ in self:
            pass
        return GenerationResult(self.text, (1, 2, 3), "stop", USAGE)


class FakeEngine:
    made: list[FakeEngine] = []
    scripts: list = []
    failure: BaseException | None = None
    vision = True

    def __init__(self, model, **options):
        if FakeEngine.failure is not None:
            raise FakeEngine.failure
        self.model, self.options = model, options
        self.requests, self.streams = [], []
        self.closed = False
        self.preprocessor = Preprocessor(size=16, patch=8) if FakeEngine.vision else None
        FakeEngine.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.closed = True

    def submit(self, request):
        self.requests.append(request)
        script = FakeEngine.scripts.pop(0) if FakeEngine.scripts else None
        self.streams.append(FakeStream(script))
        return self.streams[-1]

    def stream(self, prompt, **options):
        return self.submit(engine_module.Request(prompt, **options))


@pytest.fixture(autouse=True)
def fake(monkeypatch):
    monkeypatch.setattr(engine_module, "Engine", FakeEngine)
    FakeEngine.made, FakeEngine.scripts = [], []
    FakeEngine.failure, FakeEngine.vision = None, True
    return FakeEngine


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


def plain(text):
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


# --- ask ----------------------------------------------------------------------------------------


def test_ask_streams_the_answer_and_shows_the_cost_beside_it(fake):
    done = run("ask", "dir", "Why?", "--video", "a.mp4", "--cost", "0.3", "--frames", 8)
    assert done.exit_code == 0
    assert done.stdout == "Hello world\n"
    told = plain(done.stderr)
    assert "30 rows, 20 of them visual" in told and "31.0% of visual work" in told
    assert "5, 2 of them unchanged and not encoded again" in told
    assert "6 of 20 visual rows" in told and "1.5 KiB (4.0 KiB without reduction)" in told
    (engine,) = fake.made
    (request,) = engine.requests
    assert (request.prompt, request.video, request.frames) == ("Why?", "a.mp4", 8)
    assert request.reduction.cost == 0.3 and request.sampling.temperature == 0.0
    assert engine.closed and engine.streams[0].closed


def test_ask_passes_every_option_on(fake):
    done = run(
        "ask", "dir", "-", "--image", "a.png", "--image", "b.png", "--kv", "kv4", "--activations",
        "a8", "--memory", "2GiB", "--threads", 2, "--max-tokens", 5, "--temperature", 0.5,
        "--top-p", 0.9, "--top-k", 4, "--seed", 3, "--stop", "END", "--system", "S", "--raw",
        "--quiet",
        input="from stdin",
    )  # fmt: skip
    assert done.exit_code == 0, done.stderr
    assert done.stderr == ""
    (engine,) = fake.made
    (request,) = engine.requests
    assert engine.options == {
        "kv": "kv4", "activations": "a8", "memory": "2GiB", "threads": 2
    }  # fmt: skip
    assert request.prompt == "from stdin" and request.images == ["a.png", "b.png"]
    assert request.system == "S" and request.raw and request.reduction is None
    sampling = dataclasses.asdict(request.sampling)
    want = {"max_tokens": 5, "temperature": 0.5, "top_p": 0.9, "top_k": 4, "seed": 3}
    assert {k: sampling[k] for k in want} == want and sampling["stop"] == ("END",)


def test_ask_json_is_one_object(fake):
    done = run("ask", "dir", "Why?", "--json")
    record = json.loads(done.stdout)
    assert record["text"] == "Hello world" and record["finish_reason"] == "stop"
    assert record["usage"]["kv_bytes"] == 1536
    assert done.stderr == ""


def test_errors_say_code_cause_and_hint(fake):
    fake.failure = errors.CorruptModel("no [config] here", hint="convert it again")
    done = run("ask", "dir", "Why?")
    assert done.exit_code == 1 and done.stdout == ""
    assert plain(done.stderr).splitlines() == [
        "error corrupt_model: no [config] here",
        "hint: convert it again",
    ]


@pytest.mark.parametrize(
    "arguments",
    [
        ("ask", "dir", "Why?", "--cost", "0"),
        ("ask", "dir", "Why?", "--similarity", "0.5"),
        ("ask", "dir", "Why?", "--max-tokens", "0"),
        ("convert", "a", "b", "--weights", "w4,nonsense"),
        ("convert", "a", "b", "--range", "nonsense"),
        ("convert", "/nowhere", "/nowhere/else"),
        ("inspect", "/nowhere"),
    ],
)
def test_what_cannot_be_ends_with_one(arguments):
    done = run(*arguments)
    assert done.exit_code == 1, done.output
    assert plain(done.stderr).startswith("error ")


@pytest.mark.parametrize(
    "arguments", [("ask",), ("ask", "dir", "x", "--nonsense"), ("ask", "dir", "x", "--seed", "a")]
)
def test_wrong_usage_ends_with_two(arguments):
    assert run(*arguments).exit_code == 2


def test_ctrl_c_ends_with_130(fake):
    fake.scripts = [["Hel", KeyboardInterrupt()]]
    done = run("ask", "dir", "Why?")
    assert done.exit_code == 130 and done.stdout == "Hel"
    assert fake.made[0].streams[0].closed and fake.made[0].closed


def test_every_command_has_help_and_json():
    for name in ("convert", "ask", "chat", "inspect", "doctor"):
        done = run(name, "--help", env={"COLUMNS": "200"})
        assert done.exit_code == 0 and "--json" in plain(done.stdout)


def test_version_is_printed():
    assert run("--version").stdout.startswith("framequilt ")


# --- chat ---------------------------------------------------------------------------------------


def picture(path):
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(path)
    return path


def test_chat_keeps_the_conversation(fake, tmp_path):
    path = picture(tmp_path / "a.png")
    lines = [f"/image {path}", "What is it?", "And now?", "/reset", "Again", "/quit", "never"]
    done = run("chat", "dir", "--system", "S", "--cost", "0.5", input="\n".join(lines) + "\n")
    assert done.exit_code == 0, done.output
    assert done.stdout == "Hello world\n" * 3
    (engine,) = fake.made
    first, second, third = (r.prompt for r in engine.requests)
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user"]
    assert second[2]["content"] == "Hello world"
    assert len(parse_messages(first).media) == len(parse_messages(second).media) == 1
    assert [m["content"] for m in third] == ["S", "Again"]
    assert all(r.reduction.cost == 0.5 for r in engine.requests)


def test_chat_goes_on_after_an_error(fake):
    fake.scripts = [[errors.ContextOverflow("too long", hint="fewer frames")]]
    lines = "/nonsense\n/image /nowhere.png\n/cost 7\n/cost x\nfirst\nsecond\n"
    done = run("chat", "dir", input=lines)
    assert done.exit_code == 0
    told = plain(done.stderr)
    for code in ("unknown command /nonsense", "not_found", "cost must be", "context_overflow"):
        assert code in told
    assert done.stdout == "Hello world\n"
    # The question that failed is not part of the conversation.
    assert [m["content"] for m in fake.made[0].requests[-1].prompt] == ["second"]


def test_ctrl_c_stops_the_answer_and_the_conversation_goes_on(fake):
    fake.scripts = [["Hel", KeyboardInterrupt(), "lo"]]
    done = run("chat", "dir", input="first\nsecond\n")
    assert done.exit_code == 0
    assert done.stdout == "Hel\nHello world\n" and "stopped" in done.stderr
    (engine,) = fake.made
    assert engine.streams[0].cancelled
    assert [m["content"] for m in engine.requests[1].prompt] == ["first", "Hel", "second"]


def test_ctrl_c_at_the_prompt_leaves(fake, monkeypatch):
    def interrupted(prompt):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    done = run("chat", "dir")
    assert done.exit_code == 0 and fake.made[0].closed


def test_chat_commands(fake):
    lines = "/help\n/usage\n/cost 0.2\nhi\n/usage\n/cost off\nhi\n/system T\nhi\n"
    done = run("chat", "dir", "--similarity", "0.9", "--cost", "0.5", input=lines)
    told = plain(done.stderr)
    assert "/video PATH" in told and "no answer yet" in told and "30 rows" in told
    first, second, third = fake.made[0].requests
    assert first.reduction.cost == 0.2 and first.reduction.similarity_lower_bound == 0.9
    assert second.reduction is None
    assert third.prompt[0] == {"role": "system", "content": "T"} and len(third.prompt) == 2


def test_chat_json_is_one_line_per_answer(fake):
    done = run("chat", "dir", "--json", input="a\nb\n")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert [r["text"] for r in records] == ["Hello world"] * 2


def test_chat_with_a_text_model_refuses_pictures(fake, tmp_path):
    fake.vision = False
    done = run("chat", "dir", input=f"/image {picture(tmp_path / 'a.png')}\nhi\n")
    assert done.exit_code == 0 and "text only" in done.stderr


# --- doctor --------------------------------------------------------------------------------------


class FakeNative:
    def cpu_targets(self):
        return ["AVX2", "SSE4"]

    def version(self):
        return "9.9"


def test_doctor_tells_what_is_here(monkeypatch):
    monkeypatch.setattr(_native, "load", FakeNative)
    record = json.loads(run("doctor", "--json").stdout)
    assert record["engine"] == {
        "available": True, "version": "9.9", "simd": ["AVX2", "SSE4"], "error": None
    }  # fmt: skip
    assert record["logical_cores"] >= 1 and set(record["optional"]) == {"av", "gguf", "torch"}
    done = run("doctor")
    assert done.exit_code == 0 and "AVX2, SSE4" in done.stdout


def test_doctor_fails_without_the_engine(monkeypatch):
    def load():
        raise errors.Unsupported("the compiled engine cannot be loaded")

    monkeypatch.setattr(_native, "load", load)
    done = run("doctor")
    assert done.exit_code == 1 and "cannot be loaded" in done.stdout


class TestedEngine(FakeEngine):
    """An engine whose answers depend on company: the self-test must see that."""

    __test__ = False

    def __init__(self, model, **options):
        super().__init__(model, **options)
        self.preprocessor = None
        self.chat = self

    def encode(self, messages):
        return [1, 2]

    def generate(self, prompt, **options):
        return GenerationResult("", (1, 2), "length", USAGE)

    def generate_batch(self, requests):
        return [GenerationResult("", (1, 3), "length", USAGE) for _ in requests]

    def prompt_logits(self, ids):
        return np.zeros((2, 4), np.float32)

    def check_integrity(self):
        raise errors.InternalError("page 3 is held twice")


def test_doctor_self_test_names_what_is_wrong(monkeypatch):
    monkeypatch.setattr(_native, "load", FakeNative)
    monkeypatch.setattr(engine_module, "Engine", TestedEngine)
    done = run("doctor", "dir", "--json")
    assert done.exit_code == 1
    checks = {c["check"]: c for c in json.loads(done.stdout)["self_test"]}
    assert checks["logits are finite"]["passed"]
    assert checks["the same question has the same answer"]["passed"]
    assert "company changes" in checks["answers do not depend on company"]["trouble"]
    assert "page 3" in checks["every KV page came back"]["trouble"]
    assert "FAIL" in run("doctor", "dir").stdout


# --- inspect -------------------------------------------------------------------------------------


def test_kv_bytes_follow_the_page_layout():
    inspect = importlib.import_module("framequilt.cli.inspect")
    config = {"decoder": {"layers": 3, "attention": {"kv_heads": 2, "head_dim": 192}}}
    # Codes of K and V; scale (half) and zero (byte) of each: 128 does not divide 192, one group.
    assert inspect.kv_bytes_per_token(config, "kv32") == 3 * 2 * 2 * 192 * 4
    assert inspect.kv_bytes_per_token(config, "kv16") == 3 * 2 * 2 * 192 * 2
    assert inspect.kv_bytes_per_token(config, "kv8") == 3 * 2 * (2 * 192 + 2 * 3)
    assert inspect.kv_bytes_per_token(config, "kv4") == 3 * 2 * (192 + 2 * 3)
    assert inspect.kv_bytes_per_token(config, "k8v2g64") == 3 * 2 * (192 * 10 / 8 + 2 * 3 * 3)
    ends, inner = 2 * 2 * 192 * 2, 2 * 192 * 3 / 8 + 2 * 3
    assert inspect.kv_bytes_per_token(config, "kv3+ends16") == 2 * (2 * ends / 2 + inner)
