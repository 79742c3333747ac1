"""Writes random-weight models of real shapes, for timing only (their text is noise).

    models.py ours NAME FORMAT DIRECTORY     a Framequilt model directory
    models.py gguf NAME TYPE FILE            f16, q8_0, q4_0, q4_k_m; needs gguf
    models.py mmproj TYPE WIDTH FILE         llama.cpp's tower: f16, q8_0, q4_0; needs gguf
    models.py hf NAME DIRECTORY [DTYPE]      F16 (default) or BF16 safetensors; needs tokenizers
    models.py onnx FILE                      the tower in float32; needs onnx

Needs numpy, not torch. Tensors are written piece by piece from one pool of random bytes, so memory
stays at a few hundred megabytes whatever the model's size.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from shapes import DECODERS, MODELS, SIGLIP_SO400M, TowerShape

from framequilt.convert.spec import slots
from framequilt.model_directory import NUMPY_DTYPES, DirectoryWriter
from framequilt.quantize.formats import TensorInfo, WeightFormat, parse_format
from framequilt.quantize.tiles import pack_codes, pack_rows, to_bf16

DEVIATION = 0.02  # of the weights: activations stay finite through any number of layers
PIECE = 1 << 24  # bytes written at once
HF_SHARD_BYTES = 5 * 10**9  # of one safetensors file, as transformers writes them


class Pool:
    """Endless random bytes, normal values and their codes, from fixed pools at changing offsets."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._bytes = rng.integers(0, 256, (1 << 26) + 7919, dtype=np.uint8)
        self._normal = rng.standard_normal((1 << 22) + 7919, dtype=np.float32) * DEVIATION
        self._codes: dict[int, NDArray[np.uint8]] = {}
        self._packed: dict[int, NDArray[np.uint8]] = {}
        self._at = 0

    def _cut(self, pool: NDArray[Any], count: int) -> NDArray[Any]:
        self._at = (self._at + 6007) % 7919
        return np.resize(pool[self._at :], count)

    def bytes(self, count: int) -> NDArray[np.uint8]:
        """`count` random bytes."""
        return self._cut(self._bytes, count)

    def normal(self, *shape: int) -> NDArray[np.float32]:
        """Normal values of deviation 0.02."""
        return self._cut(self._normal, int(np.prod(shape))).reshape(shape)

    def _code_pool(self, bits: int) -> NDArray[np.uint8]:
        # The greatest of a group of weights is about three deviations from their mean, which is 0:
        # any other one would give all activations one sign, and kernels whose speed depends on the
        # inputs another one.
        if bits not in self._codes:
            zero = 2 ** (bits - 1)
            scaled = np.rint(self._normal * ((zero - 0.5) / (3 * DEVIATION)))
            self._codes[bits] = (np.clip(scaled, -(zero - 1), zero - 1) + zero).astype(np.uint8)
        return self._codes[bits]

    def codes(self, bits: int, *shape: int) -> NDArray[np.uint8]:
        """Codes of `bits` bits of normal values; the zero is 2^(bits - 1)."""
        return self._cut(self._code_pool(bits), int(np.prod(shape))).reshape(shape)

    def packed(self, bits: int, *shape: int) -> NDArray[np.uint8]:
        """The same in a single plane: 8 / bits of them in a byte. For 2, 4 and 8 bits."""
        if bits not in self._packed:
            parts = np.array_split(self._code_pool(bits)[: 1 << 22], 8 // bits)
            shifted = [part << np.uint8(bits * i) for i, part in enumerate(parts)]
            self._packed[bits] = np.bitwise_or.reduce(shifted)
        return self._cut(self._packed[bits], int(np.prod(shape))).reshape(shape)

    def scale(self, bits: int) -> float:
        """The scale at which codes of `bits` bits have the deviation 0.02."""
        return DEVIATION / float(np.std(self._code_pool(bits)))


# Framequilt --------------------------------------------------------------------------------------


def _write_linear(
    writer: DirectoryWriter, pool: Pool, slot: str, out: int, inputs: int, form: WeightFormat
) -> None:
    if form.kind != "affine":
        step = max(PIECE // (4 * inputs) // 16, 1) * 16
        for first in range(0, out, step):
            packed, _ = pack_rows(pool.normal(min(step, out - first), inputs), form)
            for suffix, data in packed.items():
                writer.write(f"{slot}.{suffix}", data, first // 8)
        return
    neutral = 2 ** (form.bits - 1)
    for info in form.tensors(slot, out, inputs):
        dtype = NUMPY_DTYPES[info.dtype]
        row_bytes = info.bytes // info.shape[0]
        step = max(PIECE // row_bytes, 1)
        for first in range(0, info.shape[0], step):
            tiles = min(step, info.shape[0] - first)
            shape = (tiles, *info.shape[1:])
            if info.name.endswith(".scales"):
                piece = np.full(shape, pool.scale(form.bits), dtype)
            elif info.name.endswith(".zeros"):
                piece = np.full(shape, neutral, dtype)
            elif inputs % 32 or 8 % form.bits:  # padding codes have to be the zero
                zeros = np.full((8 * tiles, 1), neutral, np.uint8)
                piece = pack_codes(pool.codes(form.bits, 8 * tiles, inputs), zeros, form.bits)
            else:
                piece = pool.packed(form.bits, *shape)
            writer.write(info.name, piece, first)


def write_ours(name: str, weights: str, destination: Path) -> None:
    """A model directory of one of `shapes.MODELS` with every linear in its scheme's format."""
    model = MODELS[name]
    chosen = parse_format(weights)
    # As in a conversion, embedding and head keep 8 bits. The tower does not: it is measured alone.
    tables = replace(chosen, bits=8) if chosen.kind == "affine" else chosen

    def format_of(slot: str) -> WeightFormat:
        return tables if slot in ("decoder.embedding", "decoder.head") else chosen

    wanted = slots(model)
    tensors = []
    linears: dict[str, Any] = {}
    for target, slot in wanted.items():
        if slot.linear:
            at = target.removesuffix(".weight")
            form = format_of(at)
            tensors += form.tensors(at, *slot.shape)
            out, inputs = slot.shape
            linears[at] = {"out": out, "in": inputs, "format": form.to_json()}
        else:
            tensors.append(TensorInfo(target, "F32", slot.shape))
    pool = Pool()
    with DirectoryWriter(destination, tensors) as writer:
        for target, slot in wanted.items():
            if slot.linear:
                at = target.removesuffix(".weight")
                _write_linear(writer, pool, at, *slot.shape, format_of(at))
            elif target.endswith("norm.weight"):
                writer.write(target, np.ones(slot.shape, np.float32))
            elif target.endswith(".bias"):
                writer.write(target, np.zeros(slot.shape, np.float32))
            else:
                writer.write(target, pool.normal(*slot.shape))
        writer.add_file("tokenizer.json", b"{}\n")
        if model.vision is not None:
            writer.add_file("preprocessor.json", json.dumps(PREPROCESSOR).encode())
        tokenizer = {"kind": "huggingface", "file": "tokenizer.json"}
        media = "<image>" if model.vision else ""
        writer.commit(
            {
                "name": name,
                "source": {"architecture": "random weights for benchmarks"},
                "weights": chosen.name,
                **model.to_json(),
                "tokens": {
                    "bos": None, "add_bos": False, "eos": [2], "media": media,
                    "tokenizer": tokenizer,
                },
                "defaults": {"kv": "kv16", "similarity_lower_bound": None},
                "linears": linears,
            }
        )  # fmt: skip


PREPROCESSOR = {
    "size": 384,
    "resample": "bicubic",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
    "rescale": 1 / 255,
    "image_grid_pinpoints": None,
    "time_instruction": True,
}


# GGUF --------------------------------------------------------------------------------------------


class _GgufTensors:
    """Random tensors of GGUF types, equal ones once."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer
        self.pool = Pool()
        self.cache: dict[Any, NDArray[Any]] = {}

    def _values(self, out: int, inputs: int, kind: Any) -> NDArray[Any]:
        import gguf

        quant = gguf.GGMLQuantizationType
        if kind in (quant.F32, quant.F16):
            values = self.pool.normal(out, inputs)
            return values if kind == quant.F32 else values.astype(np.float16)
        blocks = out * inputs // (256 if kind in (quant.Q4_K, quant.Q6_K) else 32)

        def half(value: float) -> NDArray[np.uint8]:
            return np.full((blocks, 1), value, np.float16).view(np.uint8).reshape(blocks, 2)

        def some(width: int) -> NDArray[np.uint8]:
            return self.pool.bytes(blocks * width).reshape(blocks, width)

        parts = {
            quant.Q4_0: lambda: [half(DEVIATION / 4.6), some(16)],
            quant.Q8_0: lambda: [half(DEVIATION / 74), some(32)],
            quant.Q4_K: lambda: [half(DEVIATION / 150), half(DEVIATION / 20), some(140)],
            quant.Q6_K: lambda: [some(208), half(DEVIATION / 1300)],
        }[kind]()
        return np.concatenate(parts, axis=1).reshape(out, -1)

    def linear(self, tensor: str, out: int, inputs: int, kind: Any) -> None:
        """In another type where the width does not fit `kind`, as llama-quantize does it."""
        import gguf

        quant = gguf.GGMLQuantizationType
        if kind in (quant.Q4_K, quant.Q6_K) and inputs % 256:
            kind = quant.Q8_0
        if kind in (quant.Q4_0, quant.Q8_0) and inputs % 32:
            kind = quant.F16
        key = (out, inputs, kind)
        if key not in self.cache:
            self.cache[key] = self._values(*key)
        data = self.cache[key]
        self.writer.add_tensor(tensor, data, raw_dtype=kind if data.dtype == np.uint8 else None)

    def vector(self, tensor: str, width: int, value: float) -> None:
        """Float32, all the same."""
        self.writer.add_tensor(tensor, np.full(width, value, np.float32))

    def write(self) -> None:
        """The file, with what was added."""
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def write_gguf(name: str, kind: str, destination: Path) -> None:
    """A GGUF file with the tensor types that llama-quantize would choose for `kind`."""
    import gguf

    quant = gguf.GGMLQuantizationType
    shape = DECODERS[name]
    main = {
        "f32": quant.F32, "f16": quant.F16, "q8_0": quant.Q8_0, "q4_0": quant.Q4_0,
        "q4_k_m": quant.Q4_K,
    }[kind]  # fmt: skip
    better = quant.Q6_K if kind in ("q4_0", "q4_k_m") else main
    writer = gguf.GGUFWriter(str(destination), "qwen2" if shape.bias else "llama")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(shape.vocab)
    writer.add_tokenizer_model("no_vocab")

    tensors = _GgufTensors(writer)
    linear = tensors.linear
    linear("token_embd.weight", shape.vocab, shape.hidden, better if shape.tied else main)
    kv = shape.kv_heads * shape.head_dim
    for i in range(shape.layers):
        at = f"blk.{i}."
        last = shape.layers
        extra = kind == "q4_k_m" and (
            i < last // 8 or i >= 7 * last // 8 or (i - last // 8) % 3 == 2
        )
        for norm in ("attn_norm", "ffn_norm"):
            tensors.vector(f"{at}{norm}.weight", shape.hidden, 1.0)
        for part, out, choice in (
            ("q", shape.hidden, main),
            ("k", kv, main),
            ("v", kv, better if extra else main),
        ):
            linear(f"{at}attn_{part}.weight", out, shape.hidden, choice)
            if shape.bias:
                tensors.vector(f"{at}attn_{part}.bias", out, 0.0)
        linear(f"{at}attn_output.weight", shape.hidden, shape.hidden, main)
        linear(f"{at}ffn_gate.weight", shape.mlp, shape.hidden, main)
        linear(f"{at}ffn_up.weight", shape.mlp, shape.hidden, main)
        linear(f"{at}ffn_down.weight", shape.hidden, shape.mlp, better if extra else main)
    tensors.vector("output_norm.weight", shape.hidden, 1.0)
    if not shape.tied:
        linear("output.weight", shape.vocab, shape.hidden, better)
    tensors.write()


def write_mmproj(
    kind: str, destination: Path, width: int, tower: TowerShape = SIGLIP_SO400M
) -> None:
    """llama.cpp's tower, with a projector to rows of `width` numbers.

    As for LLaVA: it leaves out the last layer, which such models do not read.
    """
    import gguf

    quant = gguf.GGMLQuantizationType
    main = {"f16": quant.F16, "q8_0": quant.Q8_0, "q4_0": quant.Q4_0}[kind]
    writer = gguf.GGUFWriter(str(destination), "clip")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    writer.add_bool("clip.use_gelu", True)
    numbers = {
        "image_size": tower.image,
        "patch_size": tower.patch,
        "embedding_length": tower.hidden,
        "feed_forward_length": tower.mlp,
        "block_count": tower.layers,
        "attention.head_count": tower.heads,
        "projection_dim": width,
    }
    for key, number in numbers.items():
        writer.add_uint32(f"clip.vision.{key}", number)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-6)
    for key in ("image_mean", "image_std"):
        writer.add_array(f"clip.vision.{key}", [0.5] * 3)

    tensors = _GgufTensors(writer)

    def linear(name: str, out: int, inputs: int) -> None:
        tensors.linear(f"{name}.weight", out, inputs, main)
        tensors.vector(f"{name}.bias", out, 0.0)

    pixels = (tower.hidden, 3, tower.patch, tower.patch)
    writer.add_tensor("v.patch_embd.weight", tensors.pool.normal(*pixels).astype(np.float16))
    tensors.vector("v.patch_embd.bias", tower.hidden, 0.0)
    writer.add_tensor("v.position_embd.weight", tensors.pool.normal(tower.patches, tower.hidden))
    for i in range(tower.layers):
        at = f"v.blk.{i}."
        for norm in ("ln1", "ln2"):
            tensors.vector(f"{at}{norm}.weight", tower.hidden, 1.0)
            tensors.vector(f"{at}{norm}.bias", tower.hidden, 0.0)
        for part in ("attn_q", "attn_k", "attn_v", "attn_out"):
            linear(f"{at}{part}", tower.hidden, tower.hidden)
        linear(f"{at}ffn_up", tower.mlp, tower.hidden)
        linear(f"{at}ffn_down", tower.hidden, tower.mlp)
    linear("mm.0", width, tower.hidden)
    linear("mm.2", width, width)
    tensors.write()


# Hugging Face (for converters of peers) ----------------------------------------------------------


def write_hf(
    name: str, destination: Path, dtype: str = "F16", shard_bytes: int = HF_SHARD_BYTES
) -> None:
    """A checkpoint folder in F16 or BF16 with a word-level tokenizer of tokens t0, t1, ..."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    shape = DECODERS[name]
    destination.mkdir(parents=True)
    kv = shape.kv_heads * shape.head_dim
    config = {
        "architectures": ["Qwen2ForCausalLM" if shape.bias else "LlamaForCausalLM"],
        "model_type": "qwen2" if shape.bias else "llama",
        "hidden_size": shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.mlp,
        "vocab_size": shape.vocab,
        "tie_word_embeddings": shape.tied,
        "max_position_embeddings": shape.context,
        "rope_theta": shape.rope_base,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": {"F16": "float16", "BF16": "bfloat16"}[dtype],
    }
    (destination / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (shape.vocab, shape.hidden),
        "model.norm.weight": (shape.hidden,),
    }
    for i in range(shape.layers):
        at = f"model.layers.{i}."
        for part, out in (("q", shape.hidden), ("k", kv), ("v", kv)):
            shapes[f"{at}self_attn.{part}_proj.weight"] = (out, shape.hidden)
            if shape.bias:
                shapes[f"{at}self_attn.{part}_proj.bias"] = (out,)
        shapes[f"{at}self_attn.o_proj.weight"] = (shape.hidden, shape.hidden)
        shapes[f"{at}mlp.gate_proj.weight"] = (shape.mlp, shape.hidden)
        shapes[f"{at}mlp.up_proj.weight"] = (shape.mlp, shape.hidden)
        shapes[f"{at}mlp.down_proj.weight"] = (shape.hidden, shape.mlp)
        shapes[f"{at}input_layernorm.weight"] = (shape.hidden,)
        shapes[f"{at}post_attention_layernorm.weight"] = (shape.hidden,)
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocab, shape.hidden)
    _write_safetensors(shapes, destination, dtype, shard_bytes)
    words = {("<unk>", "<s>", "</s>")[i] if i < 3 else f"t{i}": i for i in range(shape.vocab - 1)}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(destination / "tokenizer.json"))
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    (destination / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )


def _write_safetensors(
    shapes: dict[str, tuple[int, ...]], destination: Path, dtype: str, shard_bytes: int
) -> None:
    """One file, or as many as it takes with an index of them."""
    shards: list[dict[str, Any]] = [{}]
    offset = 0
    for tensor, extents in shapes.items():
        size = 2 * int(np.prod(extents))
        if offset and offset + size > shard_bytes:
            shards.append({})
            offset = 0
        shards[-1][tensor] = {
            "dtype": dtype, "shape": list(extents), "data_offsets": [offset, offset + size],
        }  # fmt: skip
        offset += size
    names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    else:
        where = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard
        }
        (destination / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    pool = Pool()
    for name, shard in zip(names, shards, strict=True):
        text = json.dumps({"__metadata__": {"format": "pt"}, **shard}).encode()
        text += b" " * (-len(text) % 8)
        with open(destination / name, "xb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for tensor in shard:
                for piece in _pieces(pool, tensor, shapes[tensor]):
                    stored = to_bf16(piece) if dtype == "BF16" else piece.astype(np.float16)
                    stream.write(stored.tobytes())


def _pieces(pool: Pool, name: str, extents: tuple[int, ...]) -> Iterator[NDArray[np.float32]]:
    if len(extents) == 1:
        yield np.full(extents, 0.0 if name.endswith("bias") else 1.0, np.float32)
        return
    step = max(PIECE // (4 * extents[1]), 1)
    for first in range(0, extents[0], step):
        yield pool.normal(min(step, extents[0] - first), extents[1])


# ONNX --------------------------------------------------------------------------------------------


def write_onnx(destination: Path, tower: TowerShape = SIGLIP_SO400M) -> None:
    """The vision tower in float32, weights in FILE.data; input pixel_values, output features."""
    import onnx
    from onnx import TensorProto, helper

    pool = Pool()
    nodes: list[Any] = []
    initializers: list[Any] = []
    data_path = destination.with_name(destination.name + ".data")
    stream = open(data_path, "xb")  # noqa: SIM115 (closed below; every tensor appends to it)

    def weight(name: str, *shape: int, value: float | None = None) -> str:
        values = pool.normal(*shape) if value is None else np.full(shape, value, np.float32)
        tensor = TensorProto(
            name=name, dims=shape, data_type=TensorProto.FLOAT,
            data_location=TensorProto.EXTERNAL,
        )  # fmt: skip
        where = {"location": data_path.name, "offset": stream.tell(), "length": values.nbytes}
        for key, entry in where.items():
            tensor.external_data.add(key=key, value=str(entry))
        stream.write(np.ascontiguousarray(values).tobytes())
        initializers.append(tensor)
        return name

    def constant(name: str, values: list[int]) -> str:
        initializers.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def linear(x: str, name: str, inputs: int, out: int) -> str:
        product = node("MatMul", [x, weight(f"{name}.weight", inputs, out)], f"{name}.product")
        return node("Add", [product, weight(f"{name}.bias", out, value=0.0)], name)

    def norm(x: str, name: str) -> str:
        tables = [
            weight(f"{name}.scale", hidden, value=1.0),
            weight(f"{name}.shift", hidden, value=0.0),
        ]
        return node("LayerNormalization", [x, *tables], name, axis=-1, epsilon=1e-6)

    hidden, heads, patches = tower.hidden, tower.heads, tower.patches
    head_dim = hidden // heads
    split = constant("split", [1, patches, heads, head_dim])
    join = constant("join", [1, patches, hidden])
    patch_inputs = [
        "pixel_values",
        weight("patch.weight", hidden, 3, tower.patch, tower.patch),
        weight("patch.bias", hidden, value=0.0),
    ]
    x = node("Conv", patch_inputs, "patches", strides=[tower.patch, tower.patch])
    x = node("Reshape", [x, constant("flat", [1, hidden, patches])], "patches.flat")
    x = node("Transpose", [x], "patches.rows", perm=[0, 2, 1])
    x = node("Add", [x, weight("position", patches, hidden)], "rows")
    for i in range(tower.layers):
        at = f"layer{i}."
        y = norm(x, at + "norm1")
        parts = {}
        for part, order in (("q", [0, 2, 1, 3]), ("k", [0, 2, 3, 1]), ("v", [0, 2, 1, 3])):
            z = node("Reshape", [linear(y, at + part, hidden, hidden), split], f"{at}{part}.split")
            parts[part] = node("Transpose", [z], f"{at}{part}.heads", perm=order)
        factor = weight(at + "factor", 1, value=head_dim**-0.5)
        scores = node("MatMul", [parts["q"], parts["k"]], at + "scores")
        scores = node("Mul", [scores, factor], at + "scores.scaled")
        shares = node("Softmax", [scores], at + "shares", axis=-1)
        z = node("MatMul", [shares, parts["v"]], at + "mixed")
        z = node("Transpose", [z], at + "mixed.rows", perm=[0, 2, 1, 3])
        z = linear(node("Reshape", [z, join], at + "mixed.join"), at + "o", hidden, hidden)
        x = node("Add", [x, z], at + "middle")
        y = linear(norm(x, at + "norm2"), at + "up", hidden, tower.mlp)
        y = node("Gelu", [y], at + "gelu", approximate="tanh")
        x = node("Add", [x, linear(y, at + "down", tower.mlp, hidden)], at + "out")
    norm(x, "features")
    pixels = helper.make_tensor_value_info(
        "pixel_values", TensorProto.FLOAT, [1, 3, tower.image, tower.image]
    )
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, [1, patches, hidden])
    graph = helper.make_graph(nodes, "tower", [pixels], [features], initializers)
    stream.close()
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
        str(destination),
    )


def main(arguments: list[str]) -> int:
    """Runs one of the commands of the module's text."""
    if len(arguments) == 4 and arguments[0] == "ours":
        write_ours(arguments[1], arguments[2], Path(arguments[3]))
    elif len(arguments) == 4 and arguments[0] == "gguf":
        write_gguf(arguments[1], arguments[2], Path(arguments[3]))
    elif len(arguments) == 4 and arguments[0] == "mmproj":
        write_mmproj(arguments[1], Path(arguments[3]), int(arguments[2]))
    elif len(arguments) in (3, 4) and arguments[0] == "hf":
        write_hf(arguments[1], Path(arguments[2]), *arguments[3:])
    elif len(arguments) == 2 and arguments[0] == "onnx":
        write_onnx(Path(arguments[1]))
    else:
        print(__doc__, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
