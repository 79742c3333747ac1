"""Whole calibrations on tiny checkpoints: resuming, memory, conversion, evaluation."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from oracles import tiny
from oracles.forward import Forward

from framequilt.convert import convert
from framequilt.errors import Cancelled, CorruptModel, InvalidArgument
from framequilt.model_directory import ModelDirectory
from framequilt.quantize.calibration.checkpoint import Checkpoint
from framequilt.quantize.calibration.samples import Sample
from framequilt.quantize.methods import Calibration, MethodResult, Options, calibrate, evaluation
from framequilt.quantize.methods.runner import plain_rounding

WEIGHTS = "w3g16"
VISUAL = "w3g16,vision.layers.*=w3g16"
SMALL = Options(search_rows=64, clip_rows=64, ratio_steps=5)


def text_of(count: int = 4, length: int = 24, seed: int = 0, vocab: int = 131) -> list[Sample]:
    rng = np.random.default_rng(seed)
    return [Sample((rng.integers(5, vocab, length),)) for _ in range(count)]


def seen(checkpoint: Checkpoint, count: int = 3, seed: int = 0) -> list[Sample]:
    """Prompts with videos of the right size, an answer of two tokens at the end."""
    vision = checkpoint.model.vision
    assert vision is not None
    rng = np.random.default_rng(seed)
    shape = (2, vision.channels, vision.image_size, vision.image_size)
    return [
        Sample(
            (
                rng.integers(5, 131, 3),
                rng.standard_normal(shape).astype(np.float32),
                rng.integers(5, 131, 6),
            ),
            scored=2,
        )
        for _ in range(count)
    ]


def layer_files(result: MethodResult) -> dict[str, bytes]:
    folder = result.work.path / "layers"
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama") / "m"
    tiny.tiny_llama(path)
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "m"
    tiny.tiny_llava_video_original(path)
    return path


KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}]
from test_methods_run import SMALL, WEIGHTS, text_of
from framequilt.quantize.calibration.checkpoint import Checkpoint
from framequilt.quantize.methods import calibrate

def kill(step):
    if step.done == 2:
        os.kill(os.getpid(), signal.SIGKILL)

calibrate(Checkpoint.open({path!r}), text_of(), method={method!r}, weights=WEIGHTS,
          activations={acts!r}, work={work!r}, options=SMALL, progress=kill)
"""


@pytest.mark.parametrize("method, acts", [("awq", "a8"), ("gptq", "a8"), ("smoothquant", "a16")])
def test_a_killed_job_goes_on_to_the_same_result(
    method: str, acts: str, llama: Path, tmp_path: Path
) -> None:
    code = KILLED.format(
        here=str(Path(__file__).parent), path=str(llama), method=method, acts=acts,
        work=str(tmp_path / "a"),
    )  # fmt: skip
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "a" / "layers").iterdir())
    assert left == ["decoder.0.safetensors", "decoder.1.safetensors"]
    resumed: list[bool] = []
    results = [
        calibrate(
            Checkpoint.open(llama), text_of(), method=method, weights=WEIGHTS, activations=acts,
            work=tmp_path / name, options=SMALL,
            progress=lambda step: resumed.append(step.resumed),
        )
        for name in ("a", "b")
    ]  # fmt: skip
    assert resumed == [True, True, False, False, False, False]
    assert layer_files(results[0]) == layer_files(results[1])


def test_a_half_written_layer_is_never_seen(llama: Path, tmp_path: Path) -> None:
    def run(**changes: Any) -> MethodResult:
        arguments: dict[str, Any] = {"weights": WEIGHTS, "work": tmp_path / "w", "options": SMALL}
        return calibrate(Checkpoint.open(llama), text_of(), method="gptq", **(arguments | changes))

    result = run()
    before = layer_files(result)
    (tmp_path / "w" / "layers" / ".decoder.1.safetensors.1").write_bytes(b"half")
    (tmp_path / "w" / "layers" / "decoder.2.safetensors").unlink()
    run()
    assert {k: v for k, v in layer_files(result).items() if not k.startswith(".")} == before
    (tmp_path / "w" / "layers" / "decoder.0.safetensors").write_bytes(b"broken")
    with pytest.raises(CorruptModel, match=r"decoder\.0"):
        run()
    with pytest.raises(InvalidArgument, match="another job: weights"):
        run(weights="w4g16")
    with pytest.raises(InvalidArgument, match="another job: options"):
        run(options=Options(act_order=False))
    with pytest.raises(InvalidArgument, match="unknown method"):
        calibrate(Checkpoint.open(llama), text_of(), method="x", work=tmp_path / "x")


def test_a_job_can_be_cancelled_between_layers(llama: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def cancelled() -> bool:
        asked.append(1)
        return len(asked) > 1

    with pytest.raises(Cancelled):
        calibrate(
            Checkpoint.open(llama), text_of(), method="awq", weights=WEIGHTS, work=tmp_path / "w",
            options=SMALL, cancelled=cancelled,
        )  # fmt: skip
    assert [p.name for p in (tmp_path / "w" / "layers").iterdir()] == ["decoder.0.safetensors"]
    assert sorted(p.name for p in (tmp_path / "w").iterdir()) == ["job.json", "layers"]


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_one_layer_is_in_memory_at_a_time_and_rows_go_to_a_file(
    method: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[Any] = []
    most = 0
    original = Checkpoint.layer

    def layer(self: Checkpoint, part: str, number: int) -> dict[str, Any]:
        nonlocal most
        gc.collect()
        tensors = original(self, part, number)
        alive.extend(weakref.ref(tensor) for tensor in tensors.values())
        most = max(most, sum(ref() is not None for ref in alive))
        return tensors

    monkeypatch.setattr(Checkpoint, "layer", layer)
    checkpoint = Checkpoint.open(llama)
    spilled: list[str] = []

    def progress(step: Any) -> None:
        spilled.extend(p.name for p in (tmp_path / "a").iterdir() if p.name.startswith("rows."))

    result = calibrate(
        checkpoint, text_of(), method=method, weights=WEIGHTS, work=tmp_path / "a", options=SMALL,
        memory_limit=0, progress=progress,
    )  # fmt: skip
    assert most == len(original(checkpoint, "decoder", 0))
    assert len(spilled) == 3
    assert not any(p.name.startswith("rows.") for p in (tmp_path / "a").iterdir())
    monkeypatch.undo()
    in_memory = calibrate(
        checkpoint, text_of(), method=method, weights=WEIGHTS, work=tmp_path / "b", options=SMALL
    )
    assert layer_files(result) == layer_files(in_memory)


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_scales_in_steps_survive_an_interruption(llama: Path, tmp_path: Path, method: str) -> None:
    """What lies in the work folder makes the same directory as what was in memory."""
    made = []
    for folder in ("a", "b"):
        calibration = Calibration(
            method, lambda checkpoint, codec: text_of(), options=SMALL, work=tmp_path / "w"
        )
        convert(llama, tmp_path / folder, weights="w3g16-offset-i8scale", method=calibration)
        made.append(ModelDirectory(tmp_path / folder))
    slot = "decoder.layers.1.mlp.down"
    assert made[0].format_of(slot).name == "w3g16-offset-i8scale"
    assert np.array_equal(made[0].linear(slot), made[1].linear(slot))


@pytest.mark.parametrize("method", ["awq", "gptq", "smoothquant"])
def test_rows_of_pictures_count_as_asked_in_the_decoder_alone(
    method: str, video: Path, tmp_path: Path
) -> None:
    from safetensors.numpy import load

    checkpoint = Checkpoint.open(video)
    files: list[dict[str, bytes]] = []
    for weight in (1.0, 0.01):
        result = calibrate(
            checkpoint, seen(checkpoint), method=method, weights=VISUAL, activations="a8",
            work=tmp_path / str(weight), options=replace(SMALL, media_weight=weight),
        )  # fmt: skip
        # Figures differ in any case: what was decided is in the tensors.
        files.append(
            {
                name: b"".join(value.tobytes() for _, value in sorted(load(data).items()))
                for name, data in layer_files(result).items()
                if name.endswith(".safetensors")
            }
        )
    differ = {name for name in files[0] if files[0][name] != files[1][name]}
    assert differ
    assert all(name.startswith("decoder") for name in differ)
    with pytest.raises(InvalidArgument, match="rows of pictures count -1"):
        calibrate(
            checkpoint, seen(checkpoint), method=method, weights=VISUAL, work=tmp_path / "x",
            options=replace(SMALL, media_weight=-1),
        )  # fmt: skip


@pytest.mark.parametrize("method", ["rtn", "awq", "gptq", "smoothquant"])
def test_the_converted_model_is_the_one_that_was_evaluated(
    method: str, video: Path, tmp_path: Path
) -> None:
    """What the directory holds, weight by weight, is what `stored` said; norms too."""
    calibration = Calibration(
        method, lambda checkpoint, codec: seen(checkpoint), work=tmp_path / "w", options=SMALL
    )
    report = convert(
        video, tmp_path / "m", weights=VISUAL, activations="a8", kv="kv32", method=calibration
    )
    assert report.config["source"]["method"].startswith(method)
    assert any(note.startswith(f"{method} on 3 samples") for note in report.notes)
    directory = ModelDirectory(tmp_path / "m")
    result, checkpoint = calibration.result, Checkpoint.open(video)
    assert result is not None
    changed = 0
    for part, count in result.layers.items():
        for n in range(count):
            weights = checkpoint.layer(part, n)
            for local, expected in result.stored(part, n, weights).items():
                slot = f"{part}.layers.{n}.{local}".removesuffix(".weight")
                if checkpoint.wanted[f"{part}.layers.{n}.{local}"].linear:
                    found = directory.linear(slot)
                else:
                    found = directory.vector(f"{part}.layers.{n}.{local}")
                assert np.array_equal(found, expected.numpy()), slot
            plain = plain_rounding(checkpoint, VISUAL, "a8", tmp_path / "plain").stored(
                part, n, weights
            )
            stored = result.stored(part, n, weights)
            changed += any(not torch.equal(stored[name], plain[name]) for name in plain)
    layers = sum(result.layers.values())
    # SmoothQuant may find that no factor is best for a layer.
    least = {"rtn": 0, "smoothquant": 1}.get(method, layers)
    assert least <= changed <= (0 if method == "rtn" else layers)
    assert list(result.layers) == ["vision", "decoder"]


def test_kept_codes_are_not_calibrated(llama: Path, tmp_path: Path) -> None:
    calibration = Calibration("awq", lambda checkpoint, codec: text_of())
    with pytest.raises(InvalidArgument, match="choose a weight format"):
        convert(llama, tmp_path / "m", weights="keep", method=calibration)
    assert not (tmp_path / "m").exists()
    with pytest.raises(InvalidArgument, match="unknown method"):
        Calibration("best", lambda checkpoint, codec: [])


def test_every_method_reports_an_error_per_layer_below_plain_rounding(
    llama: Path, tmp_path: Path
) -> None:
    for method in ("rtn", "awq", "gptq", "smoothquant"):
        result = calibrate(
            Checkpoint.open(llama), text_of(), method=method, weights=WEIGHTS,
            work=tmp_path / method, options=SMALL,
        )  # fmt: skip
        layers = result.reports()
        assert [layer["layer"] for layer in layers] == [f"decoder.layers.{n}" for n in range(3)]
        for layer in layers:
            figures = [layer["attention"], layer["mlp"]]
            if method == "gptq":
                figures = [f for half in figures for f in half.values()]
                assert len(figures) == 7
            for entry in figures:
                assert 0 < entry["error"] and 0 < entry["rtn_error"]
                if method == "rtn":
                    assert entry["error"] == entry["rtn_error"]
            total = sum(f["error"] for f in figures)
            plain = sum(f["rtn_error"] for f in figures)
            if method == "smoothquant":  # which may decide that no factor is best
                assert total <= plain or layer["attention"]["norm"]["alpha"] is not None
            elif method != "rtn":
                assert total < plain


# --- evaluation -----------------------------------------------------------------------------------


def test_kl_and_perplexity_equal_those_of_the_converted_directory(
    video: Path, tmp_path: Path
) -> None:
    """Against the float64 numpy oracle, on what the converter wrote."""
    checkpoint = Checkpoint.open(video)
    samples = seen(checkpoint, seed=5)
    calibration = Calibration("gptq", lambda c, _: seen(c), work=tmp_path / "w", options=SMALL)
    convert(video, tmp_path / "q", weights=VISUAL, kv="kv32", method=calibration)
    convert(video, tmp_path / "f", weights="f32", kv="kv32")
    exact = evaluation.run(checkpoint, samples, None, tmp_path)
    found = evaluation.run(checkpoint, samples, calibration.result, tmp_path)
    ours = evaluation.compare(checkpoint, exact, found, calibration.result)
    kl, loss, base = [], [], []
    oracles = Forward(tmp_path / "f"), Forward(tmp_path / "q")
    for sample in samples:
        logs = []
        for oracle in oracles:
            before, pixels, after = sample.parts
            rows = [oracle.embed(list(before)), oracle.video(pixels), oracle.embed(list(after))]
            logits = oracle.logits(np.concatenate(rows))[-3:-1]
            logs.append(logits - np.log(np.exp(logits).sum(-1, keepdims=True)))
        p, q = logs
        kl += list((np.exp(p) * (p - q)).sum(-1))
        target = sample.parts[-1][-2:]
        loss += [-q[n, token] for n, token in enumerate(target)]
        base += [-p[n, token] for n, token in enumerate(target)]
    # Logits of a few units in float32 through a few layers: 1e-4 is tens of their error.
    assert ours.kl == pytest.approx(kl, abs=1e-4) and min(kl) > 1e-3
    assert ours.loss == pytest.approx(loss, abs=1e-4)
    assert ours.float_loss == pytest.approx(base, abs=1e-4)
    summary = ours.summary()
    assert summary["tokens"] == 6 and summary["samples"] == 3
    assert summary["perplexity"]["value"] == pytest.approx(np.exp(np.mean(loss)), rel=1e-3)
    stored = sum(tensor.bytes for tensor in tensors_of(tmp_path / "q"))
    assert evaluation.stored_bytes(checkpoint, VISUAL) == stored
    convert(video, tmp_path / "a", weights=VISUAL, activations="a8-asym")
    sums = sum(tensor.bytes for tensor in tensors_of(tmp_path / "a")) - stored
    assert sums > 0 and evaluation.stored_bytes(checkpoint, VISUAL, "a8-asym") == stored + sums


def tensors_of(path: Path) -> list[Any]:
    from framequilt.quantize.formats import TensorInfo

    directory = ModelDirectory(path)
    return [
        TensorInfo(name, entry.dtype, entry.shape)
        for name, entry in directory.tensors.items()
        if not name.startswith("pad.")
    ]


def test_the_float_model_has_no_divergence_from_itself(llama: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(llama)
    samples = text_of(seed=4)
    exact = evaluation.run(checkpoint, samples, None, tmp_path)
    same = evaluation.compare(checkpoint, exact, exact, None)
    assert not same.kl.any() and same.same.all() and len(same.kl) == 4 * 23
    coarse = [
        evaluation.compare(
            checkpoint, exact, evaluation.run(checkpoint, samples, plain, tmp_path), plain
        ).kl.mean()
        for weights, acts in (("w8g16", "a16"), ("w4g16", "a16"), ("w2g16", "a16"), ("w2g16", "a4"))
        for plain in [plain_rounding(checkpoint, weights, acts, tmp_path / f"{weights}{acts}")]
    ]
    assert coarse == sorted(coarse) and coarse[0] > 0


def test_intervals_count_samples_not_tokens() -> None:
    rng = np.random.default_rng(0)
    offsets = rng.standard_normal(200)
    values = np.repeat(offsets, 10)
    clusters = np.repeat(np.arange(200), 10)
    found = evaluation.clustered(values, clusters)
    assert found.mean == pytest.approx(offsets.mean())
    assert found.half == pytest.approx(1.96 * offsets.std(ddof=1) / 200**0.5)
    assert evaluation.clustered(values, np.zeros(2000, np.int64)).half == np.inf


def test_scored_rows_predict_the_tokens_after_them() -> None:
    sample = Sample((np.array([7, 8]), np.zeros((1, 3, 2, 2), np.float32), np.array([9, 10, 11])))
    rows, ids = evaluation.scored_rows(sample, 2 + 4 + 3)
    assert (rows.tolist(), ids.tolist()) == ([0, 5, 6, 7], [8, 9, 10, 11])
    rows, ids = evaluation.scored_rows(Sample(sample.parts, scored=2), 9)
    assert (rows.tolist(), ids.tolist()) == ([6, 7], [10, 11])


# --- the command ----------------------------------------------------------------------------------


def command_line(*arguments: str) -> Any:
    from typer.testing import CliRunner

    from framequilt.cli.app import app

    return CliRunner().invoke(app, ["calibrate", *arguments])


def test_the_command_converts_measures_and_goes_on(llama: Path, tmp_path: Path) -> None:
    text, held_out = tmp_path / "a.txt", tmp_path / "b.txt"
    text.write_text("the cat and the dog in another rain. " * 60)
    held_out.write_text("an inner tin theatre and a hat near then. " * 60)
    options = ["--method", "gptq", "--weights", "w3g16", "--text", str(text)]
    options += ["--held-out", str(held_out), "--samples", "4", "--length", "24"]
    options += ["--held-out-samples", "3", "--held-out-length", "20", "--work", str(tmp_path / "w")]
    done = command_line(str(llama), str(tmp_path / "m"), *options, "--json")
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    plain, ours = record["held_out"]
    assert (plain["method"], ours["method"]) == ("rtn", "gptq")
    assert ours["tokens"] == 3 * 19 and ours["kl"]["mean"] > 0
    assert len(record["layers"]) == 3
    assert ModelDirectory(tmp_path / "m").config["source"]["method"].startswith("gptq")
    # The same job again, from finished layers, gives the same model; and prints tables.
    again = command_line(str(llama), str(tmp_path / "n"), *options)
    assert again.exit_code == 0, again.output
    assert "held-out text: 57 tokens in 3 samples" in again.output
    first, second = (tmp_path / name / "model-00001-of-00001.safetensors" for name in "mn")
    assert first.read_bytes() == second.read_bytes()


def test_the_command_calibrates_the_tower_on_prompts(video: Path, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (40, 30), (200, 30, 90)).save(tmp_path / "red.png")
    lines = [{"prompt": "what is it", "image": "red.png", "answer": "a hat"}, {"prompt": "and now"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [str(video), str(tmp_path / "m"), "--method", "awq"]
    arguments += ["--weights", VISUAL, "--prompts", str(tmp_path / "p.jsonl"), "--json"]
    done = command_line(*arguments)
    assert done.exit_code == 0, done.output
    layers = [layer["layer"] for layer in json.loads(done.stdout)["layers"]]
    assert "vision.layers.0" in layers and "decoder.layers.2" in layers
    arguments[1] = str(tmp_path / "n")
    refused = command_line(*arguments, "--media-weight", "-1")
    assert refused.exit_code != 0 and "rows of pictures count -1" in refused.output
    assert not (tmp_path / "n").exists()


@pytest.mark.parametrize(
    "line, problem",
    [
        ('{"prompt": 3}', "has to be a text"),
        ('{"question": "x"}', "not an object with a prompt"),
        ("{", "p.jsonl:2"),
        ('{"prompt": "x", "image": "red.png"}', "sees no pictures"),
    ],
)
def test_bad_prompts_are_named_by_their_line(
    line: str, problem: str, llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "p.jsonl").write_text(f'{{"prompt": "fine"}}\n{line}\n')
    done = command_line(
        str(llama), str(tmp_path / "m"), "--method", "awq", "--prompts", str(tmp_path / "p.jsonl")
    )
    assert done.exit_code != 0 and problem in done.output and "p.jsonl:2" in done.output
    assert not (tmp_path / "m").exists()
    nothing = command_line(str(llama), str(tmp_path / "m"), "--method", "awq")
    assert nothing.exit_code != 0 and "nothing to calibrate on" in nothing.output


def test_the_typical_change_does_not_hang_on_a_few_tokens() -> None:
    plain = np.full(400, 1e-4)
    kl = plain / 2
    kl[0] = 10.0  # the mean of kl is now 250 times that of plain
    found = evaluation.typical_change(kl, plain, np.arange(400))
    # One of 400 logarithms moves by log 2e5.
    assert found["value"] == pytest.approx(0.5 * 2e5 ** (1 / 400))
    assert found["low"] < found["value"] < found["high"] < 0.6
    kl[0] = plain[0] / 2
    assert evaluation.typical_change(kl, plain, np.arange(400))["value"] == pytest.approx(0.5)


def test_a_report_is_measured_once_and_its_answers_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from framequilt.quantize import report

    arguments = ["run", "--work", str(tmp_path / "w"), "--model", "demo", "--frames", "1"]
    arguments += ["--calibration-samples", "2", "--held-out-samples", "3", "--search-rows", "64"]
    arguments += ["--ratio-steps", "2", "--schemes", "W3g128", "--methods", "rtn,gptq"]
    report.main(arguments)
    monkeypatch.setattr(report, "measure", None)  # a second run has nothing left to measure
    report.main(arguments)
    capsys.readouterr()
    report.main(["table", "--work", str(tmp_path / "w"), "--json", str(tmp_path / "t.json")])
    plain, ours = json.loads((tmp_path / "t.json").read_text())
    assert (plain["method"], ours["method"]) == ("rtn", "gptq")
    assert ours["kl"]["mean"] - plain["kl"]["mean"] == pytest.approx(ours["kl_change"]["mean"])
    # Each answer is a word or two and an end token; the question before it is longer.
    answers = ours["answers"]
    assert answers["samples"] == 3 and 6 <= answers["tokens"] < ours["tokens"] / 2
    assert answers["float_perplexity"]["value"] < ours["float_perplexity"]["value"]
    text = capsys.readouterr().out
    assert "| W3g128 | gptq |" in text and f"n = {ours['tokens']} held-out tokens in 3" in text
    report.main(["compare", "--work", str(tmp_path / "w"), "--rows", "W3g128.gptq", "W3g128.rtn"])
    assert f"= {ours['kl_change']['mean']:+.5f} ± " in capsys.readouterr().out
