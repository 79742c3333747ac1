"""Token reduction in the whole engine against runs of the published implementation: a random
28-layer decoder, embeddings in, KV lengths, logits and greedy tokens out."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
pytest.importorskip("torch")

from oracles import tiny
from oracles.native import Answer, NativeEngine
from oracles.shared import manifest, shared
from safetensors.numpy import load_file, save_file

from framequilt.convert import convert

FOLDER = ("golden", "framefusion")


@pytest.fixture(scope="module")
def section() -> dict[str, Any]:
    found: dict[str, Any] = manifest(*FOLDER)["end_to_end"]
    return found


@pytest.fixture(scope="module")
def model(section: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published weights as a model directory in float32."""
    folder = tmp_path_factory.mktemp("golden")
    source = folder / "src"
    tiny.write_tokenizer(source, section["config"]["vocab_size"])
    config = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **section["config"]}
    (source / "config.json").write_text(json.dumps(config))
    weights = load_file(shared(*FOLDER, section["weights"]))
    save_file(weights, source / "model.safetensors")
    convert(source, folder / "model", weights="f32", kv="kv32")
    return folder / "model"


def run(model: Path, case: dict[str, Any], arrays: dict[str, Any], **options: Any) -> Answer:
    params = case["params"]
    slots = arrays["patch_type"]
    visual = np.flatnonzero(slots >= 0)
    reduction = None
    if params["cost"] is not None:
        reduction = {
            "stage": "framefusion",
            "cost": params["cost"],
            "similarity_lower_bound": params["similarity_lower_bound"],
            "ratio_lower_bound": params["ratio_lower_bound"],
            "budget_layers": params["num_layers_in_budget"],
        }
    embeds = arrays["inputs_embeds"]
    first, last = int(visual[0]), int(visual[-1]) + 1

    def item(begin: int, end: int, with_slots: bool) -> dict[str, Any]:
        return {
            "kind": "embedding",
            "data": embeds[begin:end],
            "slots": slots[begin:end] if with_slots else None,
        }

    # Text goes in as ids, the visual block as rows.
    before = [int(t) for t in arrays["text_ids_before"]]
    after = [int(t) for t in arrays["text_ids_after"]]
    assert (len(before), len(after)) == (first, len(slots) - last)
    engine = NativeEngine(model, kv="kv32", **options)
    return engine.run(
        [*before, -1, *after],
        tokens=params["max_new_tokens"],
        media=[item(first, last, True)],
        reduction=reduction,
    )


def cases() -> list[Any]:
    try:
        return [pytest.param(c, id=c["name"]) for c in manifest(*FOLDER)["end_to_end"]["cases"]]
    except pytest.skip.Exception:
        return [pytest.param(None, marks=pytest.mark.skip(reason="reference data not here"))]


@pytest.mark.parametrize("case", cases())
@pytest.mark.parametrize("options", [{}, {"chunk_rows": 7, "page_shuffle_seed": 5}], ids=str)
def test_case(model: Path, case: dict[str, Any], options: dict[str, Any]) -> None:
    arrays = load_file(shared(*FOLDER, case["file"]))
    found = run(model, case, arrays, **options)
    params = case["params"]
    assert found.error is None
    assert found.tokens == [int(t) for t in arrays["generated_ids"]]
    # Rows that entered each layer, plus one for every generated token that was fed back.
    fed = params["max_new_tokens"] - 1
    lengths = [n + fed for n in found.usage["kept_per_layer"]]
    assert lengths == case["kv_length_per_layer_after_generation"]
    # The generator of these vectors states 1.4e-5 between float64 and float32 runs of this model;
    # two float32 programs differ by at most the sum of their own errors.
    assert np.abs(found.logits - arrays["logits_per_step"]).max() <= 2 * 1.4e-5
    if params["cost"] is None:
        return
    calls = [c for c in found.usage["reduction"]["calls"] if c["branch"] != "noop"]
    expected = [c for c in case["calls"] if c["branch"] != "noop"]
    assert [c["branch"] for c in calls] == [c["branch"] for c in expected]
    assert [(c["rows_in"], c["rows_out"]) for c in calls] == [
        (c["q_len_in"], c["q_len_out"]) for c in expected
    ]
    shares = [c["share"] for c in calls if c["branch"].startswith("merge")]
    assert np.allclose(shares, expected[-1]["sparsity_list_out"], rtol=0, atol=1e-12)
