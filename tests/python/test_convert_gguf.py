"""GGUF files: values, row order, metadata, tokenizers, and hostile input.

Files are written by the package `gguf`; the logits of transformers' model are the oracle.
"""

from __future__ import annotations

import io
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")
gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")

from oracles import tiny
from oracles.forward import Forward
from tokenizers import Tokenizer

from framequilt.convert import convert
from framequilt.convert.coded import CodedTensor
from framequilt.convert.gguf import read_container
from framequilt.convert.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_files
from framequilt.errors import CorruptModel, FramequiltError, NotFound, Unsupported
from framequilt.model_directory import ModelDirectory
from framequilt.quantize import pack_quantized, unpack_linear
from framequilt.resources import smollm2_gguf

IDS = [0, 17, 5, 130, 42, 42, 77, 9, 63, 101, 28]

NAMES = {
    "embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    short = next(value for key, value in NAMES.items() if module.endswith(key))
    layer = [part for part in module.split(".") if part.isdigit()]
    return f"blk.{layer[0]}.{short}.{kind}" if layer else f"{short}.{kind}"


def interleaved(rows: Any, heads: int) -> Any:
    """The published row order of q and k for interleaved rotary pairs."""
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    kind: str = "F32",
    extra: Any = lambda writer: None,
    tokenizer: Any = None,
) -> None:
    """A transformers model as a GGUF file; matrices in `kind`, vectors in F32."""
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    (tokenizer or add_tokenizer)(writer)
    extra(writer)
    tied = config.tie_word_embeddings
    for name, weight in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        data = weight.float().numpy()
        if architecture == "llama" and ".q_proj" in name:
            data = interleaved(data, config.num_attention_heads)
        if architecture == "llama" and ".k_proj" in name:
            data = interleaved(data, config.num_key_value_heads)
        stored = kind if data.ndim == 2 else "F32"
        number = gguf.GGMLQuantizationType[stored]
        data = gguf.quants.quantize(np.ascontiguousarray(data), number)
        writer.add_tensor(gguf_name(name), data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: Any, pre: str = "qwen2") -> None:
    """The tiny byte-level tokenizer as metadata."""
    source = json.loads(tiny_tokenizer().to_str())
    table = source["model"]["vocab"]
    tokens = sorted(table, key=table.__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in tiny.SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in source["model"]["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tiny.CHATML)


def tiny_tokenizer() -> Tokenizer:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        return tiny.write_tokenizer(Path(folder))


def text_logits(model: Any) -> Any:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def close(found: Any, expected: Any) -> None:
    """float32 against float64, as in test_convert_families."""
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_llama_file_keeps_its_logits(tmp_path: Path, kind: str, tied: bool) -> None:
    """Wrong row order of q and k, or a wrong head, shows in the logits."""
    model = tiny.tiny_llama(tmp_path / "hf", seed=1, tie_word_embeddings=tied)
    write_gguf(tmp_path / "x.gguf", model, "llama", kind)
    convert(tmp_path / "x.gguf", tmp_path / "model", weights="f32")
    forward = Forward(tmp_path / "model")
    logits = forward.logits(forward.embed(IDS))
    if kind == "F16":  # bf16 values below 2^-14 lose bits in float16: at most 2^-25 each
        assert np.abs(logits - text_logits(model)).max() <= 1e-3 * np.abs(logits).max()
    else:
        close(logits, text_logits(model))


def test_a_qwen2_file_keeps_its_logits(tmp_path: Path) -> None:
    model = tiny.tiny_qwen2(tmp_path / "hf", seed=2)
    write_gguf(tmp_path / "x.gguf", model, "qwen2")
    report = convert(tmp_path / "x.gguf", tmp_path / "model", weights="f32")
    forward = Forward(tmp_path / "model")
    close(forward.logits(forward.embed(IDS)), text_logits(model))
    assert report.config["tokens"]["eos"] == [2]


def test_biases_of_q_and_k_are_put_in_order_too(tmp_path: Path) -> None:
    model = tiny.tiny_llama(tmp_path / "hf", seed=3, attention_bias=True)
    write_gguf(tmp_path / "x.gguf", model, "llama")
    convert(tmp_path / "x.gguf", tmp_path / "model", weights="f32")
    forward = Forward(tmp_path / "model")
    close(forward.logits(forward.embed(IDS)), text_logits(model))


def test_llama3_scaling_is_recognised_by_its_factors(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_theta": 10000.0,
    }
    model = tiny.tiny_llama(tmp_path / "hf", seed=4, rope_parameters=rope)

    def factors(writer: Any, wrong: float = 1.0) -> None:
        """As published converters compute them, one number per pair."""
        values = []
        for i in range(0, 16, 2):
            wavelength = 2 * math.pi * 10000.0 ** (i / 16)
            if wavelength < 64 / 4.0:
                values.append(1.0)
            elif wavelength > 64 / 1.0:
                values.append(8.0)
            else:
                smooth = (64 / wavelength - 1.0) / (4.0 - 1.0)
                values.append(wrong / ((1 - smooth) / 8.0 + smooth))
        writer.add_tensor("rope_freqs.weight", np.array(values, np.float32))
        writer.add_rope_scaling_orig_ctx_len(64)

    write_gguf(tmp_path / "x.gguf", model, "llama", extra=factors)
    report = convert(tmp_path / "x.gguf", tmp_path / "model", weights="f32")
    assert report.config["decoder"]["rope"]["scaling"]["kind"] == "llama3"
    forward = Forward(tmp_path / "model")
    close(forward.logits(forward.embed(IDS)), text_logits(model))
    write_gguf(tmp_path / "y.gguf", model, "llama", extra=lambda w: factors(w, wrong=1.1))
    with pytest.raises(Unsupported, match="rope_freqs"):
        convert(tmp_path / "y.gguf", tmp_path / "other")


FORMATS = {
    "Q4_0": "w4g32-sym",
    "Q4_1": "w4g32-offset",
    "Q5_0": "w5g32-sym",
    "Q5_1": "w5g32-offset",
    "Q8_0": "w8g32-sym",
    "Q2_K": "w2g16-offset-i8scale",
    "Q3_K": "w3g16-sym-i8scale",
    "Q4_K": "w4g32-offset-i8scale",
    "Q5_K": "w5g32-offset-i8scale",
    "Q6_K": "w6g16-sym-i8scale",
}
HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


@pytest.mark.parametrize("weights", [None, "f32"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_blocks_are_what_the_package_dequantizes(
    tmp_path: Path, kind: str, weights: str | None
) -> None:
    """Kept as codes or read in float32; rows of q and k are put in order in both."""
    sizes = {"intermediate_size": 96}
    model = tiny.tiny_llama(tmp_path / "hf", seed=5, **sizes)
    write_gguf(tmp_path / "x.gguf", model, "llama", kind)
    report = convert(tmp_path / "x.gguf", tmp_path / "model", weights=weights)
    assert any(f"x {kind}" in note for note in report.notes)
    directory = ModelDirectory(tmp_path / "model")
    wanted = {
        "token_embd.weight": ("decoder.embedding", 0),
        "blk.1.ffn_down.weight": ("decoder.layers.1.mlp.down", 0),
        "blk.1.attn_q.weight": ("decoder.layers.1.attention.q", 4),
        "blk.2.attn_k.weight": ("decoder.layers.2.attention.k", 2),
        "output.weight": ("decoder.head", 0),
    }
    for tensor in gguf.GGUFReader(tmp_path / "x.gguf").tensors:
        if tensor.name in wanted:
            slot, heads = wanted.pop(tensor.name)
            expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            found = directory.linear(slot)
            assert ((interleaved(found, heads) if heads else found) == expected).all()
            assert directory.format_of(slot).name == (weights or FORMATS[kind])
    assert not wanted


def random_blocks(kind: str, rows: int, blocks: int, seed: int) -> Any:
    """Random bytes but for the float16 scales, which are finite and of either sign."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
    generator = np.random.default_rng(seed)
    data = generator.integers(0, 256, (rows * blocks, size), np.uint8)
    for at in HALVES[kind]:
        scales = generator.uniform(-0.02, 0.02, (rows * blocks, 1)).astype(np.float16)
        data[:, at : at + 2] = scales.view(np.uint8)
    return data.reshape(rows, -1)


def write_tensor(path: Path, data: Any, kind: str) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("t", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", HALVES)
def test_k_quants_are_codes_of_ours(tmp_path: Path, kind: str) -> None:
    """The package cannot write them: random blocks do. Values and packed codes, bit for bit."""
    data = random_blocks(kind, 21, 2, seed=6)
    write_tensor(tmp_path / "x.gguf", data, kind)
    tensor = read_container(tmp_path / "x.gguf").tensors["t"]
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    assert tensor.shape == (21, 512) and np.isfinite(expected).all()
    assert (tensor.rows(0, 21) == expected).all() and (tensor.rows(1, 3) == expected[1:3]).all()
    assert isinstance(tensor, CodedTensor) and tensor.form.name == FORMATS[kind]
    packed = pack_quantized(tensor.coded_rows(0, 21), tensor.form)
    assert (unpack_linear(tensor.form, 21, 512, lambda suffix: packed[suffix]) == expected).all()


REFUSED: dict[str, Any] = {
    "experts": lambda w: w.add_expert_count(8),
    "a window": lambda w: w.add_sliding_window(128),
    "partial rotation": lambda w: w.add_rope_dimension_count(8),
    "yarn": lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
    "an unknown key": lambda w: w.add_float32("llama.attention.surprise", 1.0),
    "an unknown tensor": lambda w: w.add_tensor("blk.0.surprise", np.zeros(4, np.float32)),
    "a split file": lambda w: w.add_uint16("split.count", 2),
    "a strange pre-tokenizer": None,
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_change_results_is_unsupported(tmp_path: Path, name: str) -> None:
    model = tiny.tiny_llama(tmp_path / "hf")
    extra = REFUSED[name]
    options: dict[str, Any] = {"extra": extra}
    if extra is None:
        options = {"tokenizer": lambda writer: add_tokenizer(writer, pre="falcon")}
    write_gguf(tmp_path / "x.gguf", model, "llama", **options)
    with pytest.raises(Unsupported):
        convert(tmp_path / "x.gguf", tmp_path / "out" / "model")
    assert not (tmp_path / "out").exists()


def test_a_conversion_says_that_inputs_stay_in_float32(tmp_path: Path) -> None:
    """Who compares with llama.cpp has to know, and only who did not choose."""
    model = tiny.tiny_llama(tmp_path / "hf", intermediate_size=96)
    write_gguf(tmp_path / "x.gguf", model, "llama", "Q4_0")

    def told(**options: Any) -> bool:
        report = convert(tmp_path / "x.gguf", tmp_path / "model", dry_run=True, **options)
        return any("inputs stay in float32" in note for note in report.notes)

    assert told()
    assert not told(activations="a8,lm_head=a8") and not told(activations="a16")
    assert not told(weights="w4g32")


@pytest.mark.parametrize("kind", ["no_vocab", "falcon"])
def test_another_tokenizer_takes_the_place_of_the_files_own(tmp_path: Path, kind: str) -> None:
    """One that is missing, or that we do not know: it is not looked at."""
    tokenizers = {
        "no_vocab": lambda writer: writer.add_tokenizer_model("no_vocab"),
        "falcon": lambda writer: add_tokenizer(writer, pre="falcon"),
    }
    model = tiny.tiny_llama(tmp_path / "hf")
    write_gguf(tmp_path / "x.gguf", model, "llama", tokenizer=tokenizers[kind])
    write_gguf(tmp_path / "own.gguf", model, "llama")
    with pytest.raises((CorruptModel, Unsupported), match="tokenizer"):
        convert(tmp_path / "x.gguf", tmp_path / "x")
    convert(tmp_path / "own.gguf", tmp_path / "own")
    (tmp_path / "tokenizer").mkdir()
    content = (tmp_path / "own" / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer" / "tokenizer.json").write_bytes(content)
    convert(tmp_path / "x.gguf", tmp_path / "x", tokenizer=tmp_path / "tokenizer")
    own, other = (json.loads((tmp_path / n / "tokenizer.json").read_text()) for n in ("own", "x"))
    assert own == other


def test_other_architectures_name_what_there_is(tmp_path: Path) -> None:
    model = tiny.tiny_llama(tmp_path / "hf")
    write_gguf(tmp_path / "x.gguf", model, "falcon")
    with pytest.raises(Unsupported, match="known: llama, qwen2"):
        convert(tmp_path / "x.gguf", tmp_path / "model")


def test_damaged_files_give_coded_errors(tmp_path: Path) -> None:
    """Every kind of cut and a thousand flipped bytes in the header: an error of ours, or none."""
    model = tiny.tiny_llama(tmp_path / "hf", num_hidden_layers=1)
    write_gguf(tmp_path / "x.gguf", model, "llama")
    raw = (tmp_path / "x.gguf").read_bytes()
    header = raw.index(b"output_norm") + 400
    target = tmp_path / "y.gguf"
    for size in [*range(0, 64), *range(64, header, 211), len(raw) // 2, len(raw) - 1]:
        target.write_bytes(raw[:size])
        with pytest.raises(CorruptModel):
            convert(target, tmp_path / "model", dry_run=True)
    generator = random.Random(7)
    survived = 0
    for _ in range(1000):
        damaged = bytearray(raw)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(header)] = generator.choice([0, 1, 127, 128, 255])
        target.write_bytes(damaged)
        try:
            read_container(target)
            survived += 1
        except FramequiltError:
            pass
    assert survived < 1000
    for _ in range(60):
        damaged = bytearray(raw)
        damaged[generator.randrange(header)] ^= 1 << generator.randrange(8)
        target.write_bytes(damaged)
        try:
            convert(target, tmp_path / "model", dry_run=True)
        except FramequiltError:
            pass


TEXTS = [
    "the rain in 2024, and the an THE!",
    "I'll say: don't  they're\n\n  indented\ttabs   ",
    "<|im_start|>user\nhello<|im_end|>",
    "a1b22c333 4444",
]


def test_a_byte_level_tokenizer_encodes_as_before(tmp_path: Path) -> None:
    model = tiny.tiny_llama(tmp_path / "hf")
    write_gguf(tmp_path / "x.gguf", model, "llama")
    report = convert(tmp_path / "x.gguf", tmp_path / "model")
    made = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    for text in TEXTS:
        ids = made.encode(text, add_special_tokens=False).ids
        assert ids == tiny_tokenizer().encode(text, add_special_tokens=False).ids
        assert made.decode(ids, skip_special_tokens=False) == text
    assert report.config["tokens"]["bos"] == 0 and not report.config["tokens"]["add_bos"]
    assert (tmp_path / "model" / "chat_template.jinja").read_text() == tiny.CHATML


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["it", "'s", " 2024", "!!", " ", " THE", "\n", "\n", "ab"]),
        ("smollm", ["it", "'s", " ", *"2024", "!!", " ", " THE", "\n", "\n", "ab"]),
        ("qwen2", ["it", "'s", " ", *"2024", "!!", " ", " THE", "\n\n", "ab"]),
        ("llama-bpe", ["it", "'s", " ", "202", "4", "!!", " ", " THE", "\n\n", "ab"]),
    ],
)
def test_pre_tokenizers_cut_as_their_names_say(pre: str, expected: list[str]) -> None:
    """Against the published behaviour of each; pieces, not tokens: no merge crosses them."""
    vocab = tiny_tokenizer().get_vocab()
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": sorted(vocab, key=vocab.__getitem__),
        "tokenizer.ggml.merges": [],
    }
    made = Tokenizer.from_buffer(tokenizer_files(metadata, "x")["tokenizer.json"])
    assert made.pre_tokenizer is not None and pre in PRE_TOKENIZERS
    text = "it's 2024!!  THE\n\nab"
    pieces = made.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:stop] for _, (start, stop) in pieces] == expected


def test_a_sentencepiece_vocabulary_encodes_as_before() -> None:
    """A trained model, taken apart into what GGUF keeps, and put together again."""
    spm = pytest.importorskip("sentencepiece")
    lines = [f"{t} {n} the rain in spain falls {n * 7}" for n in range(200) for t in TEXTS]
    trained = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=trained,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["<|user|>"],
        minloglevel=2,
    )
    before = spm.SentencePieceProcessor(model_proto=trained.getvalue())
    count = before.get_piece_size()
    kinds = [
        2 if before.is_unknown(n)
        else 3 if before.is_control(n)
        else 6 if before.is_byte(n)
        else 4 if before.id_to_piece(n) == "<|user|>"
        else 1
        for n in range(count)
    ]  # fmt: skip
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [before.id_to_piece(n) for n in range(count)],
        "tokenizer.ggml.scores": np.array([before.get_score(n) for n in range(count)], np.float32),
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": before.bos_id(),
        "tokenizer.ggml.eos_token_id": before.eos_id(),
    }
    files = tokenizer_files(metadata, "x")
    after = spm.SentencePieceProcessor(model_proto=files["tokenizer.model"])
    for text in [*TEXTS, "zażółć 火 🙂", "  two  spaces", "<|user|>hi", ""]:
        assert after.encode(text) == before.encode(text)
        assert after.decode(after.encode(text)) == before.decode(before.encode(text))
    assert (after.bos_id(), after.eos_id(), after.unk_id()) == (1, 2, 0)
    settings = json.loads(files["tokenizer_config.json"])
    assert settings["add_bos_token"] and settings["bos_token"] == "<s>"


@pytest.mark.slow
def test_a_real_model_converts(tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct: every kind of tensor against the package's own reader."""
    try:
        path = smollm2_gguf()
    except NotFound as error:
        pytest.skip(f"the model cannot be had here: {error.message}")
    overrides = {"decoder.embedding": "f32", "decoder.layers.7.*": "f32"}
    report = convert(path, tmp_path / "model", weights="w8g32", overrides=overrides)
    decoder = report.config["decoder"]
    assert (decoder["layers"], decoder["hidden"], decoder["vocab"]) == (30, 576, 49152)
    assert decoder["tied_embedding"] and decoder["rope"]["base"] == 100000.0
    assert report.config["tokens"]["eos"] == [2]
    directory = ModelDirectory(tmp_path / "model")
    values = {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(path).tensors
        if tensor.name in ("token_embd.weight", "blk.7.attn_q.weight", "blk.7.ffn_down.weight")
    }
    assert (directory.linear("decoder.embedding") == values["token_embd.weight"]).all()
    down = directory.linear("decoder.layers.7.mlp.down")
    assert (down == values["blk.7.ffn_down.weight"]).all()
    query = directory.linear("decoder.layers.7.attention.q")
    assert (interleaved(query, 9) == values["blk.7.attn_q.weight"]).all()

    made = Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    text = "<|im_start|>user\nWhat is 12 + 34?<|im_end|>\n<|im_start|>assistant\n"
    ids = made.encode(text, add_special_tokens=False).ids
    assert ids[0] == 1 and ids[-1] == made.token_to_id("Ċ") and ids.count(2) == 1
    assert made.decode(ids, skip_special_tokens=False) == text
    # A model that answers sensibly after the prompt has its rows, ropes and tokens in order.
    forward = Forward(tmp_path / "model")
    prompt = made.encode("The capital of France is", add_special_tokens=False).ids
    logits = forward.logits(forward.embed(prompt))
    assert made.decode([int(logits[-1].argmax())]) == " Paris"
