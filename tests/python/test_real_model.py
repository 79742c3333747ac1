"""A real language model, SmolLM2-135M-Instruct, on real prompts, against transformers."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")

from oracles.native import NativeEngine

from framequilt import Engine, Sampling
from framequilt.convert import convert
from framequilt.errors import FramequiltError
from framequilt.model_directory import ModelDirectory
from framequilt.resources import smollm2_gguf

# See test_parity.py: two float32 programs differ by a small multiple of float32's own error.
SLACK = 8.0
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about bicycles.\nThen one about rain.",
    "def fibonacci(n):\n    # returns the n-th number\n",
)


@pytest.fixture(scope="module")
def gguf() -> Path:
    try:
        return smollm2_gguf()
    except FramequiltError as error:
        pytest.skip(f"the package with the model cannot be had here: {error}")


@pytest.fixture(scope="module")
def oracle(gguf: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def exact_model(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "f32"
    convert(gguf, path, weights="f32", kv="kv32")
    return path


def chat_ids(model: Path, question: str) -> list[int]:
    from framequilt.tokenizer import Tokenizer

    tokens = ModelDirectory(model).config["tokens"]["tokenizer"]
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return Tokenizer.open(model, tokens).encode(text, parse_special=True)


def logits(model: Any, ids: list[int]) -> tuple[np.ndarray, float]:
    with torch.no_grad():
        single = model(torch.tensor([ids])).logits[0].double().numpy()
        double = copy.deepcopy(model).double()(torch.tensor([ids])).logits[0].numpy()
    return double, float(np.abs(single - double).max())


@pytest.mark.slow
def test_logits_and_greedy_tokens_equal_transformers(exact_model: Path, oracle: Any) -> None:
    engine = NativeEngine(exact_model, kv="kv32", memory_bytes=1 << 30)
    for question in QUESTIONS:
        ids = chat_ids(exact_model, question)
        ours = engine.run(ids, tokens=32, return_prompt_logits=True)
        exact, noise = logits(oracle, ids)
        assert np.abs(ours.prompt_logits - exact).max() <= SLACK * noise
        with torch.no_grad():
            theirs = oracle.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=32,
                min_new_tokens=32,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )[0, len(ids) :].tolist()
        assert ours.tokens == theirs


@pytest.mark.slow
def test_packed_path_equals_the_dequantized_path(gguf: Path, oracle: Any, tmp_path: Path) -> None:
    path = tmp_path / "w4"
    convert(gguf, path, weights="w4g64", kv="kv32")
    directory = ModelDirectory(path)
    model = copy.deepcopy(oracle)
    state = model.state_dict()
    for slot in directory.config["linears"]:
        if slot == "decoder.embedding":
            name = "model.embed_tokens"
        else:
            _, _, layer, block, part = slot.split(".")
            block = {"attention": "self_attn"}.get(block, block)
            name = f"model.layers.{layer}.{block}.{part}_proj"
        state[f"{name}.weight"].copy_(torch.from_numpy(directory.linear(slot).copy()))
    ids = chat_ids(path, QUESTIONS[0])
    ours = NativeEngine(path, kv="kv32", memory_bytes=1 << 30).run(ids, return_prompt_logits=True)
    exact, noise = logits(model, ids)
    assert np.abs(ours.prompt_logits - exact).max() <= SLACK * noise


@pytest.mark.slow
def test_it_answers_in_four_bits(gguf: Path, tmp_path: Path) -> None:
    """The whole text path as a user runs it: chat template, w4 weights, kv8, streamed text."""
    convert(gguf, tmp_path / "w4", weights="w4g64", kv="kv8")
    with Engine(tmp_path / "w4", memory="512MiB") as engine:
        sampling = Sampling(temperature=0, max_tokens=24)
        with engine.stream("What is the capital of France?", sampling=sampling) as stream:
            text = "".join(piece.text for piece in stream)
        assert "Paris" in text
        batch = engine.generate_batch(
            [{"prompt": q, "sampling": sampling} for q in ("What is the capital of France?",) * 3]
        )
        assert [r.text for r in batch] == [text] * 3
        engine.check_integrity()
        assert engine.stats()["pages_free"] == engine.stats()["pages_total"]
