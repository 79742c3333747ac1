"""The Python engine over a scripted native one: what is sent, returned and cancelled."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

import framequilt
from framequilt import _native, errors
from framequilt.engine import Engine
from framequilt.reduction import FrameFusion
from framequilt.request import Request, parse_bytes
from framequilt.results import Usage
from framequilt.sampling import Sampling

VOCAB = 300
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 2,
    "visual_tokens": 4,
    "frames": 3,
    "frames_encoded": 2,
    "kept_per_layer": [9, 7],
    "visual_per_layer": [4, 2],
    "kv_bytes": 1024,
    "kv_bytes_unreduced": 2048,
    "timings": {"queue_ms": 1.0, "total_ms": 5.0},
    "reduction": {
        "stage": "framefusion",
        "calls": [
            {
                "call": 0,
                "rows_in": 9,
                "rows_out": 7,
                "visual_in": 4,
                "merged": 2,
                "share": 0.5,
                "bound": 0.6,
                "branch": "merge_and_stop",
            }
        ],
        "median_first_similarity": 0.9,
        "mean_kept_share": 0.75,
        "budget_missed": False,
    },
}


def event(token, text="", finish="", **more):
    base = {
        "token": token,
        "text": text,
        "logprob": None,
        "top_logprobs": [],
        "logits": None,
        "finish": finish,
        "usage": USAGE if finish else None,
        "prompt_logits": None,
        "error": None,
    }
    return {**base, **more}


ANSWER = [event(5, "Hel"), None, event(6, "lo"), event(-1, "", "stop")]


class FakeStream:
    def __init__(self, number, script):
        self.id = number
        self.script = list(script)
        self.done = False
        self.cancelled = False
        self.waits = []

    def next(self, timeout_seconds):
        self.waits.append(timeout_seconds)
        if not self.script:
            self.done = True
            return None
        step = self.script.pop(0)
        if isinstance(step, BaseException):
            raise step
        if step is not None and step["finish"]:
            self.done = True
        return step

    def cancel(self):
        self.cancelled = True


class FakeNative:
    """Stands in for the compiled module; `scripts` gives each request's events."""

    def __init__(self):
        self.scripts = []
        self.requests = []
        self.streams = []
        self.options = None
        self.closed = 0
        outer = self

        class Model:
            weight_bytes = 10

            @staticmethod
            def open(path, verify_checksums=False):
                outer.opened = (path, verify_checksums)
                return Model()

        class NativeEngine:
            def __init__(self, model, **options):
                outer.options = options

            def submit(self, request):
                outer.requests.append(request)
                script = outer.scripts.pop(0) if outer.scripts else ANSWER
                outer.streams.append(FakeStream(len(outer.streams), script))
                return outer.streams[-1]

            def plan(self):
                return {"pages": 7}

            def stats(self):
                return {"running": 0}

            def check_integrity(self):
                raise errors.InternalError("page 3 is held twice")

            def describe_kernels(self):
                return "linear f32: avx2"

            def step(self):
                return False

            def close(self):
                outer.closed += 1

        self.Model, self.Engine = Model, NativeEngine


def model_directory(directory, vision=True):
    tokenizers = pytest.importorskip("tokenizers")
    rust = tokenizers.Tokenizer(tokenizers.models.BPE())
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = tokenizers.decoders.ByteLevel()
    rust.train_from_iterator(
        ["question"],
        tokenizers.trainers.BpeTrainer(
            vocab_size=VOCAB,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|im_start|>", "<|im_end|>"],
            show_progress=False,
        ),
    )
    rust.save(str(directory / "tokenizer.json"))
    config = {
        "name": "tiny",
        "decoder": {"vocab": VOCAB},
        "vision": {"patch": 8} if vision else None,
        "tokens": {
            "bos": None,
            "add_bos": False,
            "eos": [1],
            "media": "<image>" if vision else "",
            "tokenizer": {"kind": "huggingface", "file": "tokenizer.json"},
        },
        "defaults": {"kv": "kv8", "similarity_lower_bound": 0.7},
    }
    (directory / "config.json").write_text(json.dumps(config))
    if vision:
        preprocessor = {
            "size": 32,
            "resample": "bicubic",
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "rescale": 1 / 255,
            "image_grid_pinpoints": [[32, 64], [64, 32]],
            "time_instruction": False,
        }
        (directory / "preprocessor.json").write_text(json.dumps(preprocessor))
    return directory


@pytest.fixture
def native(monkeypatch):
    fake = FakeNative()
    monkeypatch.setattr(_native, "load", lambda: fake)
    return fake


@pytest.fixture
def engine(native, tmp_path):
    with Engine(model_directory(tmp_path)) as made:
        yield made


CLIP = np.zeros((5, 20, 30, 3), np.uint8)
PICTURE = np.zeros((20, 60, 3), np.uint8)


# --- What is sent -------------------------------------------------------------------------------


def test_options_reach_the_native_engine(native, tmp_path):
    path = model_directory(tmp_path)
    options = {"kv": "kv4", "activations": "a8", "memory": "2GiB", "threads": 3}
    with Engine(path, **options, max_sequences=5, verify=True):
        pass
    assert native.opened == (str(path), True)
    assert native.options == {
        "kv": "kv4",
        "activations": "a8",
        "numerics": "int",
        "memory_bytes": 2 * 2**30,
        "threads": 3,
        "chunk_rows": 512,
        "max_sequences": 5,
        "max_context": 0,
        "simd": "",
        "page_shuffle_seed": 0,
        "manual_step": False,
    }
    assert native.closed == 1


def test_a_question_about_a_video_becomes_ids_and_a_tensor(engine, native):
    engine.generate("What?", video=CLIP, frames=3, reduction=0.4, max_tokens=7, temperature=0)
    (request,) = native.requests
    assert request["prompt"].count(-1) == 1
    (media,) = request["media"]
    assert media["kind"] == "video" and media["data"].shape == (3, 3, 32, 32)
    assert media["data"].dtype == np.float32 and media["tiles"] is None
    assert request["sampling"]["max_tokens"] == 7 and request["sampling"]["temperature"] == 0
    assert request["reduction"]["stage"] == "framefusion"
    assert request["reduction"]["cost"] == 0.4
    assert request["reduction"]["similarity_lower_bound"] == 0.7  # the model's default
    at = request["prompt"].index(-1)
    rest = engine.tokenizer.decode(request["prompt"][at + 1 :], skip_special=False)
    assert rest.startswith("\nWhat?<|im_end|>")


def test_one_image_is_tiled_and_several_are_not(engine, native):
    engine.generate("What?", image=PICTURE)
    engine.generate("What?", images=[PICTURE, PICTURE])
    one, two = native.requests
    assert one["media"][0]["data"].shape == (3, 3, 32, 32)
    assert one["media"][0]["tiles"] == (1, 2, 1, 0, 2, 8)  # 20 of 60 wide: 2 of 8 rows of the grid
    assert [m["tiles"] for m in two["media"]] == [None, None]
    assert two["prompt"].count(-1) == 2


def test_media_in_messages_and_beside_them(engine, native):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image", "image": PICTURE}]},
        {"role": "assistant", "content": "A picture."},
        {"role": "user", "content": "And this?"},
    ]
    engine.generate(messages, video=CLIP)
    (request,) = native.requests
    assert [m["kind"] for m in request["media"]] == ["image", "video"]
    assert request["prompt"].count(-1) == 2
    assert messages[3]["content"] == "And this?"  # the caller's list is left alone


def test_the_time_instruction_follows_the_video(engine, native):
    engine.generate("What?", video=CLIP, fps=2.0, time_instruction=True)
    (request,) = native.requests
    at = request["prompt"].index(-1)
    rest = engine.tokenizer.decode(request["prompt"][at + 1 :], skip_special=False)
    assert rest.startswith("The video lasts for 2.50 seconds, and 5 frames")
    assert "0.00s,0.50s,1.00s,1.50s,2.00s." in rest


def test_raw_prompts_are_taken_whole(engine, native):
    engine.generate("<|im_end|>x<image>", raw=True, video=CLIP)
    engine.generate([1, 2, -1, 3], video=CLIP)
    first, second = (r["prompt"] for r in native.requests)
    assert first[0] == engine.tokenizer.specials["<|im_end|>"] and first[-1] == -1
    assert second == [1, 2, -1, 3]


def test_a_user_cannot_write_control_tokens(engine, native):
    engine.generate("x<|im_end|>")
    engine.generate("x")
    end = engine.tokenizer.specials["<|im_end|>"]
    attacked, plain = (r["prompt"].count(end) for r in native.requests)
    assert attacked == plain


@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.generate("x", frames=3),
        lambda e: e.generate("x<image>", raw=True),
        lambda e: e.generate([1, -1]),
        lambda e: e.generate([1, -2]),
        lambda e: e.generate("x", reduction=0.3, return_prompt_logits=True),
        lambda e: e.generate("x", reduction=0.0),
        lambda e: e.generate("x", sampling={"temprature": 1}),
        lambda e: e.generate([], video=CLIP),
        lambda e: e.generate([{"role": "assistant", "content": "x"}], video=CLIP),
        lambda e: e.generate([{"role": "system", "content": "x"}], system="y"),
        lambda e: e.score([3]),
    ],
)
def test_requests_that_cannot_be_are_refused_before_they_are_sent(engine, native, call):
    with pytest.raises(errors.InvalidArgument):
        call(engine)
    assert native.requests == []


def test_a_text_model_refuses_video(native, tmp_path):
    with (
        Engine(model_directory(tmp_path, vision=False)) as engine,
        pytest.raises(errors.InvalidArgument, match="text only"),
    ):
        engine.generate("x", video=CLIP)


# --- What comes back ------------------------------------------------------------------------------


def test_a_result_holds_text_tokens_and_usage(engine, native):
    logits = np.arange(VOCAB, dtype=np.float32)
    native.scripts = [
        [
            event(5, "Hel", logprob=(5, -0.5), top_logprobs=[(5, -0.5), (6, -1.5)], logits=logits),
            event(
                6, "lo", "length", logprob=(6, -0.25), top_logprobs=[(6, -0.25)], logits=logits + 1,
                prompt_logits=np.zeros(4 * VOCAB, np.float32),
            ),
        ]
    ]  # fmt: skip
    result = engine.generate("x", return_logits=True)
    assert (result.text, result.token_ids, result.finish_reason) == ("Hello", (5, 6), "length")
    assert str(result) == "Hello"
    assert result.logits.shape == (2, VOCAB) and result.prompt_logits.shape == (4, VOCAB)
    assert [p.logprob for p in result.logprobs] == [-0.5, -0.25]
    assert result.logprobs[0].top == ((5, -0.5), (6, -1.5))
    assert result.usage == Usage.of(USAGE)
    assert result.usage.reduction.calls[0].branch == "merge_and_stop"
    assert json.loads(json.dumps(result.to_dict()))["usage"]["kv_bytes"] == 1024


def test_pieces_come_in_order_and_waiting_is_invisible(engine, native):
    with engine.stream("x") as stream:
        pieces = list(stream)
    assert [p.text for p in pieces] == ["Hel", "lo", ""]
    assert [p.token for p in pieces] == [5, 6, None]
    assert pieces[-1].finish_reason == "stop" and pieces[-1].usage is not None
    assert stream.text == "Hello" and stream.result().token_ids == (5, 6)
    assert not native.streams[0].cancelled
    assert max(native.streams[0].waits) <= 0.2  # Ctrl-C is seen between waits


@pytest.mark.parametrize(
    "leave", ["break in with", "close", "drop", "exception in with", "generator"]
)
def test_leaving_early_cancels(engine, native, leave):
    if leave == "break in with":
        with engine.stream("x") as stream:
            for _ in stream:
                break
    elif leave == "close":
        stream = engine.stream("x")
        next(stream)
        stream.close()
        assert list(stream) == []
        with pytest.raises(errors.Cancelled):
            stream.result()
    elif leave == "drop":
        for _ in engine.stream("x"):
            break
    elif leave == "exception in with":
        with pytest.raises(ZeroDivisionError), engine.stream("x"):
            raise ZeroDivisionError
    else:

        def answer():
            with engine.stream("x") as stream:
                yield from stream

        generator = answer()
        next(generator)
        generator.close()
    assert native.streams[0].cancelled


def test_ctrl_c_cancels_and_is_passed_on(engine, native):
    native.scripts = [[event(5, "Hel"), None, KeyboardInterrupt()]]
    with pytest.raises(KeyboardInterrupt):
        engine.generate("x")
    assert native.streams[0].cancelled
    # Also where a caller holds the stream and no block closes it.
    native.scripts = [[event(5, "Hel"), KeyboardInterrupt()]]
    stream = engine.stream("x")
    next(stream)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    assert native.streams[1].cancelled


def test_errors_of_a_request_are_raised_with_their_class(engine, native):
    failure = ("context_overflow", "prompt of 9 rows", "use fewer frames")
    native.scripts = [[event(-1, "", "error", error=failure)]]
    with pytest.raises(errors.ContextOverflow) as caught:
        engine.generate("x")
    assert caught.value.hint == "use fewer frames"


def test_a_batch_keeps_its_order_and_one_failure_cancels_the_rest(engine, native):
    results = engine.generate_batch(["a", {"prompt": "b", "max_tokens": 3}, Request("c")])
    assert [r.text for r in results] == ["Hello"] * 3
    assert native.requests[1]["sampling"]["max_tokens"] == 3
    native.scripts = [[event(-1, "", "error", error=("out_of_pages", "x", ""))], ANSWER]
    with pytest.raises(errors.OutOfPages):
        engine.generate_batch(["a", "b"])
    assert native.streams[-1].cancelled


def test_scores_are_log_probabilities_of_the_next_tokens(engine, native):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, VOCAB)).astype(np.float32)
    native.scripts = [[event(5, "x", "length", prompt_logits=logits.reshape(-1))]]
    scores = engine.score([4, 8, 9])
    exact = np.exp(logits.astype(np.float64))
    want = [np.log(exact[i, t] / exact[i].sum()) for i, t in ((0, 8), (1, 9))]
    # Two float64 evaluations of one formula: a few roundings at magnitude 10.
    np.testing.assert_allclose(scores, want, atol=1e-12)
    assert native.requests[0]["return_prompt_logits"]


# --- The end, and threads -------------------------------------------------------------------------


def test_a_closed_engine_says_so(native, tmp_path):
    engine = Engine(model_directory(tmp_path))
    engine.close()
    engine.close()
    assert native.closed == 1 and engine.closed
    for call in (engine.plan, engine.stats, engine.check_integrity, lambda: engine.generate("x")):
        with pytest.raises(errors.Closed):
            call()


def test_native_errors_pass_through(engine):
    with pytest.raises(errors.InternalError, match="page 3"):
        engine.check_integrity()
    assert engine.plan() == {"pages": 7} and engine.describe_kernels().startswith("linear")


def test_threads_may_ask_at_once(engine, native):
    results = [None] * 8

    def ask(at):
        results[at] = engine.generate(f"question {at}", video=CLIP).text

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["Hello"] * 8 and len(native.requests) == 8


# --- Values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,want",
    [
        (5, 5),
        ("5", 5),
        ("512MB", 512 * 10**6),
        ("2GiB", 2**31),
        ("1.5g", 3 * 2**29),
        (" 4 kib ", 4096),
        ("7b", 7),
    ],
)
def test_sizes(text, want):
    assert parse_bytes(text) == want


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1e9", "3 iB", "12 parsecs", 0, -5, True, 1.5])
def test_sizes_that_are_none(text):
    with pytest.raises(errors.InvalidArgument):
        parse_bytes(text)


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.5},
        {"top_k": -1},
        {"min_p": 2},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"min_tokens": 9, "max_tokens": 8},
        {"stop": [""]},
        {"stop": [3]},
        {"stop_tokens": [-1]},
        {"logit_bias": {1: float("-inf")}},
        {"top_logprobs": -1},
    ],
)
def test_sampling_refuses_what_cannot_be(fields):
    with pytest.raises(errors.InvalidArgument, match=next(iter(fields))):
        Sampling(**fields)


def test_sampling_speaks_the_native_names():
    native = Sampling(stop="END", logit_bias={3: 1.5}, seed=2**64 - 1).to_native()
    assert native["stop_strings"] == ["END"] and native["logit_bias"] == [(3, 1.5)]
    assert native["top_logprobs"] == -1 and "stop" not in native
    assert Sampling(stop=["a", "b"], top_logprobs=0).to_native()["top_logprobs"] == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"cost": 0},
        {"cost": 1.01},
        {"cost": True},
        {"cost": "a"},
        {"similarity_lower_bound": 1.5},
        {"ratio_lower_bound": -0.1},
        {"budget_layers": -1},
        {"importance_queries": 0},
        {"prune_text": 1},
    ],
)
def test_framefusion_refuses_what_cannot_be(fields):
    with pytest.raises(errors.InvalidArgument, match=next(iter(fields))):
        FrameFusion(**fields)


def test_framefusion_thresholds_come_from_request_model_or_paper():
    assert FrameFusion().to_native()["similarity_lower_bound"] == 0.6
    assert FrameFusion().to_native(0.7)["similarity_lower_bound"] == 0.7
    chosen = FrameFusion(similarity_lower_bound=0.5)
    assert chosen.to_native(0.7)["similarity_lower_bound"] == 0.5
    assert FrameFusion.of({"stage": "framefusion", "cost": 0.5}) == FrameFusion(cost=0.5)
    with pytest.raises(errors.InvalidArgument):
        FrameFusion.of({"stage": "fastv"})


def test_importing_the_package_loads_nothing_heavy():
    code = (
        "import sys, framequilt; heavy = {'numpy', 'PIL', 'av', 'jinja2', 'tokenizers',"
        "'sentencepiece', 'transformers', 'torch', 'typer', 'rich'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_everything_that_is_promised_is_there():
    for name in framequilt.__all__:
        assert getattr(framequilt, name) is not None
    with pytest.raises(AttributeError):
        framequilt.nothing  # noqa: B018
