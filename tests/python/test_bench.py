"""The benchmark harness works: models are made and opened, programs run, rows are judged.

Nothing here is about speed. The run on toy models needs bench_engine (built with
-DFRAMEQUILT_BENCH=ON) and skips where it is not built.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tests" / "bench"
STORED = BENCH / "results" / "avx512.json"
sys.path.insert(0, str(BENCH))
import instructions  # noqa: E402
import merging  # noqa: E402
import models  # noqa: E402
import processor  # noqa: E402
import report  # noqa: E402
from benches import Bench, Target  # noqa: E402
from measure import HOPELESS, QUIET, Runner, Series, alternate, last_json  # noqa: E402

sys.path.remove(str(BENCH))

from framequilt.convert.sources import open_source  # noqa: E402
from framequilt.model_directory import ModelDirectory  # noqa: E402


def _programs() -> Path:
    found = [path.parent for path in ROOT.glob("build/*/tests/bench/bench_engine")]
    named = os.environ.get("FRAMEQUILT_BENCH_PROGRAMS")
    if named:
        found = [Path(named)]
    if not found:
        pytest.skip("bench_engine is not built: cmake --preset dev -DFRAMEQUILT_BENCH=ON")
    return max(found, key=lambda path: (path / "bench_engine").stat().st_mtime)


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(BENCH / "run.py"), "--tiny", "--patience", "0"]
    command += ["--build", str(_programs()), "--out", str(out), "--models", str(out / "models")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    document: dict[str, Any] = json.loads((out / "results.json").read_text())
    document["table"] = (out / "table.md").read_text()
    return document


def test_every_bench_of_a_tiny_run_has_a_value(tiny_run: dict[str, Any]) -> None:
    names = {f"{kind}-tiny" for kind in ("prefill", "decode", "tower", "projector", "load")}
    assert set(tiny_run["series"]) == names
    for listed in tiny_run["series"].values():
        for series in listed:
            assert series.get("median", 0) > 0, series
    for row in tiny_run["rows"]:
        assert row["workload"] in tiny_run["table"]


def _run(*arguments: str | Path) -> str:
    command = [sys.executable, str(BENCH / "run.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _race(kernels: str, *programs: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH / "race.py"), kernels, *map(str, programs)]
    command += ["--seconds", "0.05", "--cpu", str(min(os.sched_getaffinity(0)))]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_race_compares_every_program_with_the_first() -> None:
    program = _programs() / "bench_kernels"
    kernel = "linear f32 896x4864 rows 512"
    done = _race(kernel, program, program)
    assert done.returncode == 0, done.stderr
    title, first, second = done.stdout.splitlines()
    assert title == kernel
    assert first.split()[-2:] == ["1.000", str(program)]
    assert 0.3 < float(second.split()[-2]) < 3  # the same program twice


def test_a_race_of_engines_compares_cpu_seconds(tmp_path: Path) -> None:
    programs = []
    for name, steps in (("short", 2_000_000), ("long", 8_000_000)):
        programs.append(tmp_path / name)
        programs[-1].write_text(
            f"#!{sys.executable}\nimport sys\n"
            "assert sys.argv[1:] == ['a model', 'vision', '--threads', '1']\n"
            f"for _ in range({steps}): pass\n"
        )
        programs[-1].chmod(0o755)
    command = [sys.executable, str(BENCH / "race.py"), "--engine", "'a model' vision"]
    done = subprocess.run([*command, *map(str, programs)], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert [line.split()[-1] for line in lines] == [str(p) for p in programs]
    first, second = (float(line.split()[0]) for line in lines)
    assert float(lines[1].split()[3]) == pytest.approx(second / first, rel=0.05)
    assert second > first
    programs[1].write_text("#!/bin/sh\nexit 7\n")
    done = subprocess.run([*command, *map(str, programs)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "long ended with status 7" in done.stderr


def test_a_race_without_runners_or_kernels_says_so(tmp_path: Path) -> None:
    program = _programs() / "bench_kernels"
    done = _race("no such kernel", program)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no kernel's name contains" in done.stderr
    done = _race("linear f32", tmp_path / "missing")
    assert done.returncode == 1
    assert "ended with status" in done.stderr


def test_listing_benches_makes_no_models(tmp_path: Path) -> None:
    """They would be made in a folder that cannot be: with 20 GB, trying has to fail at once."""
    (tmp_path / "file").touch()
    listed = _run("--list", "--models", tmp_path / "file" / "models")
    assert {"tower", "load", "video-llm-28l"} <= {line.split()[0] for line in listed.splitlines()}


def test_only_the_models_of_the_benches_that_run_are_made(tmp_path: Path) -> None:
    chosen = ("--tiny", "--patience", "0", "--only", "load", "--build", _programs())
    _run(*chosen, "--out", tmp_path / "out", "--models", tmp_path / "models")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["tiny-w4g128"]


def test_a_later_call_replaces_its_benches_and_keeps_the_others(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "results.json").write_text(json.dumps(tiny_run))
    chosen = ("--tiny", "--patience", "0", "--only", "load", "--build", _programs())
    where = ("--out", tmp_path, "--models", tmp_path / "models")
    _run(*chosen, *where, "--merge", tmp_path / "results.json")
    merged = json.loads((tmp_path / "results.json").read_text())
    assert list(merged["series"]) == list(tiny_run["series"])
    assert merged["series"]["tower-tiny"] == tiny_run["series"]["tower-tiny"]
    assert merged["series"]["load-tiny"] != tiny_run["series"]["load-tiny"]
    assert [run["benches"] for run in merged["runs"]] == [
        ["prefill-tiny", "decode-tiny", "tower-tiny", "projector-tiny"],
        ["load-tiny"],
    ]
    assert [row["run"] for row in merged["rows"]] == [1, 1, 1, 2]
    assert merged["runs"][0]["limits"] == tiny_run["limits"]
    table = (tmp_path / "table.md").read_text()
    assert "Run 1: " in table
    assert "Run 2: " in table


def _call(series: dict[str, list[Series]], **fields: Any) -> dict[str, Any]:
    """A document of one call."""
    rows = [{"bench": name, "workload": name} for name in series]
    machine = json.loads(STORED.read_text())["machine"]
    document = {"machine": machine, "threads": 2, "clock": "wall", "samples": 1, "rows": rows}
    document |= {"date": "today", "revision": "new", "versions": {}, "limits": {}, "budget": []}
    listed = {name: [one.to_json() for one in of] for name, of in series.items()}
    return document | {"series": listed} | fields


def test_rows_of_stored_results_say_which_call_they_are_from() -> None:
    stored = json.loads(STORED.read_text())
    merged = merging.merge(stored, _call({"load": [_series("w4g128", [0.1])]}))
    for row in merged["rows"]:
        assert row["bench"] in merged["runs"][row["run"] - 1]["benches"]
    assert len(merged["rows"]) == len(stored["rows"])
    assert merged["runs"][-1]["benches"] == ["load"]
    assert merged["runs"][-1]["revision"] == "new"
    assert not any("load" in run["benches"] for run in merged["runs"][:-1])
    of_load = next(row for row in merged["rows"] if row["bench"] == "load")
    assert of_load["workload"] == "load"  # the new one


def test_results_of_another_number_of_threads_are_not_merged() -> None:
    old = _call({"a": [_series("x", [1.0])]})
    with pytest.raises(merging.Mismatch, match="threads 2 and 4"):
        merging.merge(old, _call({"b": [_series("x", [1.0])]}, threads=4))


def test_results_of_processors_with_other_instructions_are_not_merged() -> None:
    stored = {path.stem: json.loads(path.read_text()) for path in STORED.parent.glob("*.json")}
    assert stored.keys() == {"amx", "avx2", "avx512", "zen1", "zen4-avx2", "zen5"}
    with pytest.raises(merging.Mismatch, match="avx512_vnni"):
        merging.merge(stored["avx512"], stored["avx2"])
    with pytest.raises(merging.Mismatch, match="family 23"):  # the same name and instructions
        merging.merge(stored["avx2"], stored["zen1"])
    with pytest.raises(merging.Mismatch, match="model 17"):
        merging.merge(stored["avx2"], stored["zen4-avx2"])


def test_merged_benches_are_in_the_order_of_the_list() -> None:
    old = _call({"c": [_series("x", [1.0])], "gone": [], "a": []})
    merged = merging.merge(old, _call({"b": []}, samples=3), ["a", "b", "c"])
    assert merged["samples"] == "1 to 3"
    assert list(merged["series"]) == ["a", "b", "c", "gone"]
    assert [row["run"] for row in merged["rows"]] == [1, 2, 1, 1]


def test_samples_survive_being_stored() -> None:
    series = _series("w4 a8", [9.0, 1.0, 2.0], others=0.5, batch=8)
    series.others[0] = 0.0
    again = Series.from_json(json.loads(json.dumps(series.to_json())))
    assert again == series
    assert again.median == 9.0
    skipped = Series("x", skipped="not here")
    assert Series.from_json(skipped.to_json()) == skipped


def test_the_budget_takes_from_earlier_calls_what_is_missing_and_says_so() -> None:
    plain = _series("cost 1", [90.0], prefill_s=80.0, decode_s=10.0, prompt_rows=6760)
    reduced = _series("cost 0.3", [9.0], prefill_s=7.0, decode_s=2.0)
    peers = [_series("llama.cpp prefill", [67.6]), _series("llama.cpp decode", [3.2])]
    first = _call(
        {
            "tower": [_series("w4g128 a8 attention a8", [2.0]), _series("onnxruntime int8", [3.0])],
            "video-tower": [_series("llama.cpp f16", [6.0]), _series("llama.cpp q8_0", [5.0])],
            "video-llm-28l": [plain, reduced, *peers],
        },
        date="the first day",
        revision="old",
    )
    parts = {
        "video-frames": [_series("PyAV", [0.25])],
        "video-projector": [_series("w4g128 a8", [0.5])],
    }
    merged = merging.merge(first, _call(parts))
    *listed, total = report.budget(merging.series_of(merged), merging.earlier(merged))
    shallower = pytest.approx(2.0 * 32 * 26 / 27)
    assert [[stage[side] for side in report.SIDES] for stage in listed] == [
        [0.25] * 4,
        [shallower, shallower, 5.0 * 32, pytest.approx(3.0 * 32 * 26 / 27)],
        [16.0] * 4,
        [80.0, 7.0, pytest.approx(100.0), pytest.approx(100.0)],
        [10.0, 2.0, pytest.approx(20.0), pytest.approx(20.0)],
    ]
    assert total["reduced"] == pytest.approx(sum(stage["reduced"] for stage in listed))
    text = report.markdown(merged | {"rows": [], "budget": [*listed, total]})
    sums = total["llama"] / total["ours"], total["llama"] / total["reduced"]
    assert f"{sums[0]:.2f}x llama.cpp's parts without reduction, {sums[1]:.2f}x " in text
    assert "(target 8x: **missed**)" in text
    quick = [{"stage": "sum", "how": "", "ours": 60, "reduced": 10, "llama": 80, "peer": 70}]
    text = report.markdown(merged | {"rows": [], "budget": quick})
    assert "1.33x llama.cpp's parts without" in text
    assert "8.00x llama.cpp's parts with reduction (target 8x: reached), 7.00x with" in text
    stages = {stage["stage"]: stage["how"] for stage in listed}
    assert "from the run" not in stages["decode and resize frames"] + stages["projector"]
    for name in ("vision tower", "prompt", "64 tokens"):
        assert "from the run of the first day, revision old" in stages[name]


def test_limits_of_the_machine_are_measured(tiny_run: dict[str, Any]) -> None:
    for moment in ("before", "after"):
        found = tiny_run["limits"][moment]
        assert found["read_gbytes_per_s"]["median"] > 0
        assert found["float_gflops"]["median"] > 0
        assert found["clock_ghz"]["median"] > 0
        assert found["float_flop_per_cycle"]["median"] > 0
    assert "GHz" in tiny_run["table"]


def test_peaks_of_limits_are_taken_from_registers() -> None:
    """An accumulator in memory makes a peak of the latency of a store and a load."""
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("needs objdump")
    command = [objdump, "-d", "--no-show-raw-insn", str(_programs() / "limits")]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    counted = re.compile(r"\t(vfmadd231ps|vpdpbusd|vpmaddubsw|vpaddw|fmla|sdot)\b")
    found = [i for i, line in enumerate(code) if counted.search(line)]
    if not found:
        pytest.skip("this processor has none of the instructions")
    for i in found:
        for line in code[i : i + 2]:
            assert not re.search(r"\(%[re][sb]p|\[sp", line), line


def test_bytes_of_a_decode_step_are_those_of_the_model(
    tiny_run: dict[str, Any], tmp_path: Path
) -> None:
    """Weights: every decoder tensor (the embedding is the head too). KV: all pages' tokens."""
    models.write_ours("tiny", "w4g128", tmp_path / "tiny")
    opened = ModelDirectory(tmp_path / "tiny")
    weights = sum(
        tensor.data.nbytes for name, tensor in opened.tensors.items() if name.startswith("decoder.")
    )
    detail = tiny_run["series"]["decode-tiny"][0]["detail"]
    # Batch 2, 2 layers, 32 prompt tokens and half of the 8 that are timed.
    kv = 2 * 2 * (32 + 4) / 64 * detail["page_bytes"]
    assert detail["bytes_per_step"] == pytest.approx(weights + kv, rel=1e-5)  # printed: 6 digits


def test_a_reduced_video_keeps_fewer_rows(tiny_run: dict[str, Any]) -> None:
    detail = tiny_run["series"]["tower-tiny"][0]["detail"]
    # 4 x 4 patches, pooled by 2, with a newline per row of the grid: 6 rows of each of two frames.
    assert detail["visual_rows"] == 12
    assert 0 < detail["kept_share"] < 1


def test_the_projector_stage_makes_the_rows_of_a_prompt(tiny_run: dict[str, Any]) -> None:
    """And is timed often enough: it is milliseconds beside a tower's seconds."""
    detail = tiny_run["series"]["projector-tiny"][0]["detail"]
    assert detail["visual_rows"] == 12
    assert detail["calls"] >= 5
    assert detail["value"] * 2 * detail["calls"] == pytest.approx(detail["seconds"], rel=1e-4)
    assert 0 < detail["arrange_share"] < 1


@pytest.mark.parametrize(
    ("text", "name", "bfloat16"),
    [
        (
            "model name\t: EPYC\nflags\t: sse2 avx2 avx512f avx512_bf16\n\nmodel name\t: EPYC\n",
            "EPYC (avx2, avx512f, avx512_bf16)",
            True,
        ),
        ("model name\t: EPYC\nflags\t: sse2 avx2\n", "EPYC (avx2)", False),
        (
            "cpu family\t: 23\nmodel\t\t: 1\nmodel name\t: EPYC\nflags\t: avx2\n",
            "EPYC, family 23, model 1 (avx2)",
            False,
        ),
        (
            "model name\t: Xeon\nflags\t: avx512_bf16 amx_bf16 amx_tile amx_int8\n",
            "Xeon (avx512_bf16, amx_int8, amx_bf16)",
            True,
        ),
        ("Features\t: fp asimd asimddp i8mm bf16\n", "(asimd, asimddp, i8mm, bf16)", True),
    ],
)
def test_machines_are_told_apart_by_family_model_and_instructions(
    text: str, name: str, bfloat16: bool, tmp_path: Path
) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text(text)
    assert processor.processor_name(info).endswith(name)
    assert processor.multiplies_bfloat16(info) is bfloat16


@pytest.mark.parametrize("weights", ["f32", "bf16", "w4g128", "w5g32", "w8g128"])
def test_random_models_have_the_mean_and_deviation_they_are_meant_to_have(
    weights: str, tmp_path: Path
) -> None:
    models.write_ours("tiny-video", weights, tmp_path / "model")
    opened = ModelDirectory(tmp_path / "model", verify=True)
    for slot in opened.config["linears"]:
        found = opened.linear(slot)
        # Hundreds of values at least: the deviation of a sample is within a few percent.
        assert np.std(found) == pytest.approx(models.DEVIATION, rel=0.2), slot
        # A mean shows in every activation: with thousands of inputs all get the same sign.
        assert abs(np.mean(found)) < 4 * models.DEVIATION / np.sqrt(found.size), slot


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_checkpoints_hold_the_same_weights_in_one_file_and_in_several(
    dtype: str, tmp_path: Path
) -> None:
    pytest.importorskip("tokenizers")
    models.write_hf("tiny", tmp_path / "one", dtype)
    models.write_hf("tiny", tmp_path / "many", dtype, shard_bytes=60_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    whole, parts = (open_source(tmp_path / name).tensors for name in ("one", "many"))
    assert list(whole) and sorted(whole) == sorted(parts)
    for name, tensor in whole.items():
        values = tensor.all()
        assert tensor.dtype == dtype
        assert np.array_equal(values, parts[name].all()), name
        if values.ndim == 2:
            assert np.std(values) == pytest.approx(models.DEVIATION, rel=0.2), name


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_gguf_files_of_peers_are_what_the_gguf_package_reads(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    models.write_gguf("tiny", kind, path)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    up = tensors["blk.1.ffn_up.weight"]
    values = gguf.quants.dequantize(up.data, up.tensor_type)
    assert values.shape == (128, 64)
    assert np.std(values) == pytest.approx(models.DEVIATION, rel=0.2)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_the_tower_of_a_peer_has_the_layers_of_ours(kind: str, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tower.gguf"
    # A width that blocks of 32 do not divide, as that of the so400m.
    models.write_mmproj(kind, path, 48, replace(models.SIGLIP_SO400M, layers=2, hidden=64, mlp=80))
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    shapes = {"v.blk.1.attn_out": (64, 64), "v.blk.1.ffn_up": (80, 64), "mm.2": (48, 48)}
    shapes |= {"v.blk.0.ffn_down": (64, 80), "mm.0": (48, 64)}
    for name, shape in shapes.items():
        tensor = tensors[f"{name}.weight"]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert values.shape == shape
        assert np.std(values) == pytest.approx(models.DEVIATION, rel=0.2)
        assert tensors[f"{name}.bias"].data.shape == shape[:1]
        wanted = kind if shape[1] % 32 == 0 else "f16"
        assert tensor.tensor_type.name.lower() == wanted
    assert tensors["v.position_embd.weight"].data.shape == (27 * 27, 64)
    assert reader.get_field("clip.vision.block_count").contents() == 2


def _series(name: str, values: list[float], others: float = 0.0, **detail: float) -> Series:
    series = Series(name, values=values, others=[others] * len(values))
    series.detail = dict(detail)
    return series


def _judged(bench: Bench, *series: Series, read: float | None = None) -> dict[str, Any]:
    (row,) = report.rows(bench, {s.name: s for s in series}, read)
    return row


def test_a_row_takes_the_best_of_each_side() -> None:
    target = Target("x", ("w4",), ("peer",), 2.0)
    ours = _series("w4 a8", [90.0, 100.0, 110.0]), _series("w4 a16", [10.0])
    peers = _series("peer one", [49.0]), _series("peer two", [20.0]), _series("other", [1000.0])
    row = _judged(Bench("b", "b", "tok/s", [target]), *ours, *peers)
    assert row["ours"]["name"] == "w4 a8"
    assert row["peer"]["name"] == "peer one"
    assert row["ratio"] == pytest.approx(100 / 49)
    assert row["reached"] is True


def test_fewer_seconds_are_better() -> None:
    target = Target("x", ("w4",), ("peer",), 2.0)
    bench = Bench("b", "b", "s", [target], higher_is_better=False)
    row = _judged(bench, _series("w4", [3.0]), _series("peer", [5.0]), _series("peer 2", [6.0]))
    assert row["ratio"] == pytest.approx(5 / 3)
    assert row["reached"] is False


def test_share_of_the_bandwidth_counts_a_step_of_a_batch_once() -> None:
    bench = Bench("b", "b", "tok/s", [Target("x", ("w4",), limit_share=0.85)])
    # 80 tokens per second of 8 sequences are 10 steps per second of 2 GB each: 20 GB/s.
    ours = _series("w4", [80.0], bytes_per_step=2e9, batch=8)
    row = _judged(bench, ours, read=25.0)
    assert row["ratio"] == pytest.approx(0.8)
    assert row["reached"] is False


def test_a_part_of_the_time_has_to_stay_below_its_share() -> None:
    target = Target("x", ("w4",), part="stage_s", most_share=0.01)
    bench = Bench("b", "b", "s", [target], higher_is_better=False)
    below = _judged(bench, _series("w4", [9.0], seconds=10.0, stage_s=0.09))
    assert below["ratio"] == pytest.approx(0.009)
    assert below["reached"] is True
    assert _judged(bench, _series("w4", [9.0], seconds=10.0, stage_s=0.11))["reached"] is False
    document = {
        "machine": "m", "threads": 1, "date": "d", "revision": "r", "samples": 1,
        "clock": "wall time", "versions": {}, "limits": {}, "runs": [{}], "budget": [],
        "rows": [below],
    }  # fmt: skip
    assert "| 0.90% | under 1% | yes |" in report.markdown(document)


def test_a_read_bandwidth_that_changed_around_a_bench_is_said() -> None:
    bench = Bench("b", "b", "tok/s", [Target("x", ("w4",), limit_share=0.85)])
    ours = _series("w4", [10.0], bytes_per_step=2e9, batch=1)
    (steady,) = report.rows(bench, {"w4": ours}, 36.0, 35.0)
    (moved,) = report.rows(bench, {"w4": ours}, 60.0, 35.0)
    assert steady["notes"] == []
    assert moved["ratio"] == pytest.approx(20 / 60)
    assert len(moved["notes"]) == 1
    assert "35.0 to 60.0 GB/s" in moved["notes"][0]


def test_each_sample_is_judged_by_the_bandwidth_around_it() -> None:
    bench = Bench("b", "b", "tok/s", [Target("x", ("w4",), limit_share=0.85)])
    ours = _series("w4", [10.0, 20.0, 30.0, 15.0, 40.0], bytes_per_step=2e9, batch=1)
    # Shares 20/40 and 40/50 and 60/80; one during which the rate changed, and a disturbed one.
    ours.reads = [(40.0, 39.0), (48.0, 50.0), (80.0, 79.0), (30.0, 60.0), (10.0, 10.0)]
    ours.others[4] = QUIET + 1
    row = _judged(bench, ours, read=1000.0)
    assert row["ratio"] == pytest.approx(60 / 80)
    assert row["peer"]["median"] == 80.0
    assert row["peer"]["used_gbytes_per_s"] == pytest.approx(60.0)
    assert any("30.0 to 80.0 GB/s; 1 of 4 samples" in note for note in row["notes"])
    stored = Series.from_json(ours.to_json())
    assert stored.reads == ours.reads
    # Nothing but changes: judged by the greater rate.
    ours = _series("w4", [10.0], bytes_per_step=2e9, batch=1)
    ours.reads = [(30.0, 60.0)]
    row = _judged(bench, ours)
    assert row["ratio"] == pytest.approx(20 / 60)
    assert any("by the greater" in note for note in row["notes"])


def test_a_disturbed_sample_is_said_and_does_not_count() -> None:
    series = _series("w4", [10.0, 100.0])
    series.others = [QUIET + 1, 0.0]
    bench = Bench("b", "b", "tok/s", [Target("x", ("w4",))])
    row = _judged(bench, series)
    assert row["ours"]["median"] == 100.0
    assert any("1 of 2 disturbed" in note for note in row["notes"])


def test_a_row_whose_samples_were_all_disturbed_is_not_judged() -> None:
    bench = Bench("b", "b", "tok/s", [Target("x", ("w4",), ("peer",), 2.0)])
    row = _judged(bench, _series("w4", [9.0]), _series("peer", [1.0], others=2 * HOPELESS))
    assert row["ratio"] == pytest.approx(9.0)
    assert row["reached"] is None
    assert "too disturbed to judge" in row["notes"]


def test_a_missing_side_leaves_the_row_open() -> None:
    bench = Bench("b", "b", "tok/s", [Target("x", ("w4",), ("peer",), 2.0)])
    bench.missing.append("no folder of peers was given")
    row = _judged(bench, _series("w4", [1.0]))
    assert row["reached"] is None
    assert row["notes"] == ["no folder of peers was given"]


def _python(name: str, text: str) -> Runner:
    return Runner(name, (sys.executable, "-c", text), last_json)


def test_samples_alternate_and_a_program_may_decline(tmp_path: Path) -> None:
    log = tmp_path / "log"
    note = f"open({str(log)!r}, 'a').write"
    text = "{note}('{name}'); print('noise'); print('{{\"value\": 2}}')"
    runners = [_python(name, text.format(note=note, name=name)) for name in "ab"]
    runners.append(_python("c", "import sys; sys.exit('broken')"))
    runners.append(_python("d", "import sys; print('not here', file=sys.stderr); sys.exit(3)"))
    asked = []

    def read(name: str) -> float | None:
        asked.append(name)
        return float(len(asked)) if name == "a" else None

    result = alternate(runners, 3, 0.0, read=read)
    assert log.read_text() == "ababab"
    # Not after those that have no share, nor of those that declined.
    assert result["a"].reads == [(1.0, 2.0), (6.0, 7.0), (9.0, 10.0)]
    assert result["b"].reads == []
    assert result["a"].values == [2.0, 2.0, 2.0]
    assert result["c"].skipped == "exit 1: broken"
    assert result["d"].skipped == "not here"


def test_the_time_of_a_deep_model_is_told_by_two_of_fewer_layers() -> None:
    """A last layer of 2 s, others of 10 s, and 5 s for the rest of the model."""
    text = 'print(\'{{"value": {value}, "prefill_s": {seconds}, "rows": {rows}}}\')'

    def runner(name: str, rate: bool, broken: bool = False) -> Runner:
        def of(layers: int) -> Runner:
            seconds = 5 + 2 + 10 * (layers - 1)
            value = 700 / seconds if rate else seconds
            one = text.format(value=value, seconds=seconds, rows=layers)
            return _python(name, "import sys; sys.exit('no')" if broken and layers == 1 else one)

        return replace(of(4), rate=rate, shallow=of(1), layers=(1, 4, 28))

    runners = [runner("rate", True), runner("time", False), runner("broken", True, True)]
    result = alternate(runners, 1, 0.0)
    seconds = 5 + 2 + 10 * 27
    assert result["rate"].values == [pytest.approx(700 / seconds)]
    assert result["time"].values == [pytest.approx(seconds)]
    assert result["time"].detail == {"value": 37, "prefill_s": pytest.approx(seconds), "rows": 4}
    assert result["broken"].skipped == "exit 1: no"


def test_cpu_time_is_that_of_the_work_that_the_long_run_does_more() -> None:
    """Both runs load for the same time; what is counted is the difference."""
    text = """
import json, time
start = time.process_time()
while time.process_time() - start < {seconds}: pass
print(json.dumps({{"value": 1}}))
"""
    command = {s: (sys.executable, "-c", text.format(seconds=s)) for s in (0.3, 0.9)}
    rate = Runner("rate", command[0.9], last_json, (), command[0.3], 60.0)
    time_ = Runner("time", command[0.9], last_json, (), command[0.3], 2.0, rate=False)
    without = Runner("without", command[0.3], last_json)
    result = alternate([rate, time_, without], 1, 0.0, cpu=True)
    # 0.6 CPU seconds by construction; starting Python varies by far less than half of that.
    assert result["rate"].values[0] == pytest.approx(100, rel=0.5)
    assert result["time"].values[0] == pytest.approx(0.3, rel=0.5)
    assert result["without"].skipped


def test_an_instruction_count_may_rise_by_the_tolerance_only() -> None:
    baseline = {"a": 1000, "b": 1000, "c": 1000, "gone": 5}
    counted = {"a": 1000, "b": 1029, "c": 1031, "new": 7}
    wrong = instructions.compare(counted, baseline)
    assert len(wrong) == 3
    assert wrong[0].startswith("c:")
    assert wrong[1].startswith("new:")
    assert wrong[2].startswith("gone:")


def _build(root: Path, name: str, kind: str) -> Path:
    """A build folder of that type with something called count_kernels."""
    folder = root / "build" / name / "tests" / "bench"
    folder.mkdir(parents=True)
    (folder / "count_kernels").touch()
    cache = f"CMAKE_BUILD_PARALLEL:STRING=Release\nCMAKE_BUILD_TYPE:STRING={kind}\nOTHER:BOOL=ON\n"
    (root / "build" / name / "CMakeCache.txt").write_text(cache)
    return folder


def test_instructions_are_counted_in_a_release_build_only(tmp_path: Path) -> None:
    dev = _build(tmp_path, "dev", "RelWithDebInfo")
    for asked in (None, dev):
        with pytest.raises(RuntimeError, match="of build type RelWithDebInfo.*--preset release"):
            instructions.choose(asked, tmp_path)
    release = _build(tmp_path, "release", "Release")
    assert instructions.choose(None, tmp_path) == release / "count_kernels"
    assert instructions.choose(release, tmp_path) == release / "count_kernels"
    with pytest.raises(RuntimeError, match="of build type RelWithDebInfo"):
        instructions.choose(dev, tmp_path)
    (tmp_path / "build" / "release" / "CMakeCache.txt").unlink()
    with pytest.raises(RuntimeError, match="of build type unknown"):
        instructions.choose(release, tmp_path)


def test_without_a_build_the_instruction_gate_says_how_to_make_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dev = _build(tmp_path, "dev", "RelWithDebInfo")
    assert instructions.main(["--build", str(dev), "--update"]) == 2
    assert "cmake --preset release -DFRAMEQUILT_BENCH=ON" in capsys.readouterr().out
