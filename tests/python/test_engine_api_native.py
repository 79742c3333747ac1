"""The Python API and the command line over the real engine, with tiny random models."""

from __future__ import annotations

import _thread
import gc
import json
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("framequilt._framequilt", reason="the compiled engine is not built")

from oracles import tiny

from framequilt import Engine, FrameFusion, Sampling, errors
from framequilt.cli.app import app
from framequilt.convert import convert

GREEDY = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
ENDLESS = Sampling(max_tokens=1500, temperature=1.0, ignore_eos=True)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    tiny.tiny_qwen2(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "model", weights="bf16", kv="kv16")
    return folder / "model"


@pytest.fixture(scope="module")
def video_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("video")
    tiny.tiny_llava_video_original(folder / "checkpoint")
    convert(folder / "checkpoint", folder / "model", weights="bf16", kv="kv16")
    return folder / "model"


@pytest.fixture(scope="module")
def engine(video_model):
    with Engine(video_model, memory="64MiB") as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left_behind(request):
    yield
    if "engine" in request.fixturenames:
        engine = request.getfixturevalue("engine")
        gc.collect()
        deadline = time.monotonic() + 20
        while engine.stats()["running"] + engine.stats()["waiting"]:
            assert time.monotonic() < deadline, engine.stats()
            time.sleep(0.01)
        engine.check_integrity()
        stats = engine.stats()
        assert stats["pages_free"] == stats["pages_total"]


def clip(frames=6, still=True):
    rng = np.random.default_rng(0)
    first = rng.integers(0, 255, (1, 40, 50, 3), dtype=np.uint8)
    noise = rng.integers(0, 255, (frames, 40, 50, 3), dtype=np.uint8)
    return np.repeat(first, frames, axis=0) if still else noise


def test_streaming_and_waiting_say_the_same(engine):
    whole = engine.generate("What?", video=clip(), sampling=GREEDY)
    with engine.stream("What?", video=clip(), sampling=GREEDY) as stream:
        pieces = list(stream)
    assert "".join(p.text for p in pieces) == whole.text
    assert tuple(p.token for p in pieces if p.token is not None) == whole.token_ids
    assert len(whole.token_ids) == 12 and whole.finish_reason == "length"
    assert whole.usage.completion_tokens == 12
    assert engine.tokenizer.decode(whole.token_ids) == whole.text


def test_a_still_video_is_reduced_and_cost_one_changes_nothing(engine):
    plain = engine.generate("What?", video=clip(), sampling=GREEDY)
    same = engine.generate("What?", video=clip(), sampling=GREEDY, reduction=1.0)
    assert same.token_ids == plain.token_ids
    reduced = engine.generate("What?", video=clip(), sampling=GREEDY, reduction=FrameFusion(0.3))
    usage = reduced.usage
    assert usage.reduction.stage == "framefusion" and usage.reduction.mean_kept_share < 0.5
    assert usage.visual_tokens == plain.usage.visual_tokens > usage.visual_per_layer[-1]
    assert usage.kept_per_layer[0] >= usage.kept_per_layer[-1]
    assert plain.usage.reduction.mean_kept_share == 1.0
    # The question is text, and text outside the video is never dropped.
    text = usage.prompt_tokens - usage.visual_tokens
    assert usage.kept_per_layer[-1] - usage.visual_per_layer[-1] == text


def test_a_text_prompt_with_a_reduction_is_answered_as_without(engine):
    with_, without = (
        engine.generate("Hello", sampling=GREEDY, reduction=r).token_ids for r in (0.3, None)
    )
    assert with_ == without


def test_leaving_a_stream_early_frees_its_pages(engine):
    with engine.stream("Tell me", sampling=ENDLESS) as stream:
        for at, _ in enumerate(stream):
            if at == 3:
                break
    for _ in engine.stream("Tell me", sampling=ENDLESS):
        break
    # `nothing_is_left_behind` looks at the pages.


def test_cancelling_gives_what_was_said_so_far(engine):
    with engine.stream("Tell me", sampling=ENDLESS) as stream:
        next(stream)
        stream.cancel()
        result = stream.result()
    assert result.finish_reason == "cancelled" and 1 <= len(result.token_ids) < 1500


def test_ctrl_c_stops_a_long_answer_at_once(engine):
    stopped = threading.Event()

    def press() -> None:
        # Again and again: Python itself drops an interrupt that arrives inside a finalizer.
        while not stopped.wait(0.3):
            _thread.interrupt_main()

    # Processes that a shell starts in the background ignore Ctrl-C from birth.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    finger = threading.Thread(target=press)
    finger.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            try:
                for _ in range(1000):
                    engine.generate("Tell me", sampling=ENDLESS)
            finally:
                stopped.set()
        finger.join()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_batch_equals_one_by_one(engine):
    requests = [
        {"prompt": "What?", "video": clip(still=False), "sampling": GREEDY, "reduction": 0.5},
        {"prompt": "Hello there", "sampling": GREEDY},
        {"prompt": "What?", "video": clip(3), "sampling": GREEDY},
    ]
    together = engine.generate_batch(requests)
    alone = [engine.generate(**r) for r in requests]
    assert [r.token_ids for r in together] == [r.token_ids for r in alone]


def test_threads_get_their_own_answers(engine):
    questions = [f"question {i}" for i in range(6)]
    want = [engine.generate(q, sampling=GREEDY).token_ids for q in questions]
    got = [None] * len(questions)

    def ask(at):
        got[at] = engine.generate(questions[at], sampling=GREEDY).token_ids

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == want


def test_seeds_make_samples_repeatable(engine):
    def sample(seed):
        sampling = Sampling(max_tokens=20, temperature=1.0, seed=seed, ignore_eos=True)
        return engine.generate("Hello", sampling=sampling).token_ids

    assert sample(1) == sample(1) != sample(2)


def test_log_probabilities_agree_with_logits_and_scores(engine):
    result = engine.generate(
        "Hello", sampling=Sampling(max_tokens=5, temperature=0.0, ignore_eos=True, top_logprobs=3),
        return_logits=True,
    )  # fmt: skip
    assert result.logits.shape == (5, engine.config["decoder"]["vocab"])
    for entry, row, token in zip(result.logprobs, result.logits, result.token_ids, strict=True):
        exact = row.astype(np.float64) - np.log(np.exp(row.astype(np.float64)).sum())
        assert entry.token == token == int(row.argmax())
        # float32 log-softmax over 131 values of magnitude 10: some 1e-6 each.
        assert entry.logprob == pytest.approx(exact[token], abs=1e-4)
        assert [t for t, _ in entry.top] == list(np.argsort(-row, kind="stable")[:3])
    ids = engine.chat.encode_raw("Hello there")
    scores = engine.score(ids)
    assert scores.shape == (len(ids) - 1,) and (scores < 0).all()


def test_stop_strings_end_the_answer_before_the_match(engine):
    whole = engine.generate("Hello", sampling=GREEDY)
    stop = whole.text[3:5]
    cut = engine.generate(
        "Hello", sampling=Sampling(max_tokens=12, temperature=0.0, ignore_eos=True, stop=stop)
    )
    assert cut.finish_reason == "stop"
    assert cut.text == whole.text[: whole.text.index(stop)]


def test_requests_that_cannot_run_raise_and_the_engine_serves_on(engine):
    with pytest.raises(errors.ContextOverflow):
        engine.generate("x" * 40_000)
    with pytest.raises(errors.FramequiltError):
        engine.generate([10**6])
    assert engine.generate("Hello", sampling=GREEDY).text


def test_a_text_model_answers_and_refuses_video(text_model):
    with Engine(text_model, memory="16MiB", kv="kv8") as engine:
        assert len(engine.generate("Hello", sampling=GREEDY).token_ids) == 12
        with pytest.raises(errors.InvalidArgument, match="text only"):
            engine.generate("Hello", video=clip())
        assert engine.plan()["pages"] > 0 and "linear" in engine.describe_kernels()


def test_closing_ends_what_runs(text_model):
    engine = Engine(text_model, memory="16MiB")
    stream = engine.stream("Tell me", sampling=ENDLESS)
    next(stream)
    engine.close()
    try:
        assert stream.result().finish_reason == "cancelled"
    except errors.FramequiltError as error:
        assert error.code in ("closed", "cancelled")
    with pytest.raises(errors.Closed):
        engine.generate("Hello")


@pytest.mark.parametrize(
    "options,kind",
    [
        ({"memory": "1KiB"}, errors.FramequiltError),
        ({"kv": "kv5"}, errors.InvalidArgument),
        ({"simd": "MMX"}, errors.FramequiltError),
        ({"memory": "much"}, errors.InvalidArgument),
    ],
)
def test_engines_that_cannot_be_made(text_model, options, kind):
    with pytest.raises(kind):
        Engine(text_model, **options)


def test_damaged_models_are_refused(text_model, tmp_path):
    with pytest.raises(errors.NotFound):
        Engine(tmp_path / "none")
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in text_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = next(broken.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(errors.CorruptModel):
        Engine(broken, verify=True)
    weights.write_bytes(data[:-64])
    with pytest.raises(errors.CorruptModel):
        Engine(broken)


# --- The command line ---------------------------------------------------------------------------


def run(*arguments, **options):
    return CliRunner().invoke(app, [str(a) for a in arguments], **options)


def test_ask_answers_from_a_video_file(video_model, tmp_path):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in clip(10, still=False):
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            out.mux(stream.encode(picture.reformat(64, 48)))
        out.mux(stream.encode(None))
    common = ("ask", video_model, "What?", "--video", path, "--frames", 4, "--max-tokens", 6)
    done = run(*common, "--cost", 0.3, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["usage"]["visual_tokens"] > 0
    assert record["usage"]["reduction"]["stage"] == "framefusion"
    spoken = run(*common, "--cost", 0.3, "--quiet")
    assert spoken.exit_code == 0 and spoken.stdout == record["text"] + "\n"


def test_chat_remembers(video_model):
    done = run("chat", video_model, "--max-tokens", 4, "--json", input="Hello\nAgain\n")
    assert done.exit_code == 0, done.output
    first, second = (json.loads(line) for line in done.stdout.splitlines())
    assert second["usage"]["prompt_tokens"] > first["usage"]["prompt_tokens"]


def test_inspect_tells_sizes_that_add_up(video_model):
    done = run("inspect", video_model, "--verify", "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["verified"] and record["plan"]["pages"] > 0 and record["plan_error"] is None
    assert record["effective_bits"] >= 16
    for entry in record["files"]:
        assert (video_model / entry["name"]).stat().st_size == entry["bytes"]
    kv = record["kv_bytes_per_token"]
    # A page of the engine holds 64 tokens of one layer (rounded up to 64 bytes for each head).
    page = record["plan"]["page_bytes"]
    assert 64 * kv["kv16"] <= page * record["decoder"]["layers"] < 64 * kv["kv16"] * 1.1
    shown = run("inspect", video_model)
    assert shown.exit_code == 0 and "memory plan" in shown.stdout


def test_doctor_passes_on_sound_models(text_model, video_model):
    for model in (text_model, video_model):
        done = run("doctor", model, "--memory", "64MiB", "--json")
        checks = json.loads(done.stdout)["self_test"]
        assert done.exit_code == 0, checks
        assert all(c["passed"] for c in checks) and len(checks) >= 4


def test_convert_makes_a_model_that_answers(tmp_path):
    tiny.tiny_llama(tmp_path / "checkpoint")
    dry = run("convert", tmp_path / "checkpoint", tmp_path / "m", "--dry-run", "--json")
    assert dry.exit_code == 0 and not (tmp_path / "m").exists()
    made = run("convert", tmp_path / "checkpoint", tmp_path / "m", "--weights", "w8g32")
    assert made.exit_code == 0, made.output
    assert "largest relative errors" in made.stdout
    again = run("convert", tmp_path / "checkpoint", tmp_path / "m")
    assert again.exit_code == 1 and "exists" in again.stderr
    answered = run("ask", tmp_path / "m", "Hello", "--max-tokens", 3, "--json")
    assert answered.exit_code == 0, answered.output
    assert json.loads(answered.stdout)["usage"]["completion_tokens"] >= 1
