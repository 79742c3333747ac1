"""What a family file provides, and the parts that several families share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from framequilt.convert.config_reader import ConfigReader
from framequilt.convert.rules import LeaveOut, Rule
from framequilt.convert.sources import Source
from framequilt.convert.spec import ACTIVATIONS, Attention, Decoder, Mlp, Model, Norm, Rope
from framequilt.errors import CorruptModel, Unsupported


@dataclass(frozen=True)
class Description:
    """What a family makes of a checkpoint's config."""

    model: Model
    rules: list[Rule]
    left_out: list[LeaveOut]
    zero_filled: list[str] = field(default_factory=list)  # slots that may be absent: zeros
    text_config: dict[str, Any] = field(default_factory=dict)  # where bos_token_id is looked up
    media: str = ""  # placeholder in the chat template's output
    template_changes: dict[str, str] = field(default_factory=dict)  # text -> text
    preprocessor: dict[str, Any] | None = None
    similarity_lower_bound: float | None = None  # recommended for token reduction


@dataclass(frozen=True)
class Family:
    """One row of the table of families."""

    name: str
    architectures: tuple[str, ...]
    model_types: tuple[str, ...]
    describe: Callable[[Source], Description]


def read_rope(cfg: ConfigReader, head_dim: int) -> Rope:
    """Rotary positions from `rope_theta` and `rope_scaling`, or from `rope_parameters`.

    Errors: Unsupported for scalings other than linear and llama3.
    """
    if "rope_parameters" in cfg:
        part = cfg.sub("rope_parameters")
        base = part.number("rope_theta", cfg.number("rope_theta", 10000.0))
        cfg.ignore("rope_scaling")  # older spelling of the same
    else:
        base = cfg.number("rope_theta", 10000.0)
        part = ConfigReader({}, cfg.where)
        if "rope_scaling" in cfg:
            part = cfg.sub("rope_scaling")
        else:
            cfg.ignore("rope_scaling")
    cfg.require("partial_rotary_factor", 1, reason="only whole heads are rotated in this family")
    part.require("partial_rotary_factor", 1, reason="only whole heads are rotated in this family")
    older = part.text("type", "default")
    kind = part.text("rope_type", older)
    scaling: dict[str, Any]
    if kind == "default":
        scaling = {"kind": "none"}
        part.ignore("factor")
    elif kind == "linear":
        scaling = {"kind": "linear", "factor": part.number("factor")}
    elif kind == "llama3":
        scaling = {
            "kind": "llama3",
            "factor": part.number("factor"),
            "low_freq_factor": part.number("low_freq_factor"),
            "high_freq_factor": part.number("high_freq_factor"),
            "original_context": part.integer("original_max_position_embeddings"),
        }
    else:
        raise Unsupported(
            f"{part.where}: rotary scaling {kind!r}", "known: default, linear, llama3"
        )
    part.finish()
    return Rope(base, head_dim, scaling)


def read_decoder(
    cfg: ConfigReader,
    *,
    qkv_bias: bool,
    output_bias: bool,
    mlp_bias: bool,
    tied: bool | None = None,
) -> Decoder:
    """A pre-norm RMS decoder with rotary attention and a gated MLP. Errors: those of the reader."""
    hidden, heads = cfg.integer("hidden_size"), cfg.integer("num_attention_heads")
    head_dim = cfg.integer("head_dim", None)
    if head_dim is None:
        if hidden % heads:
            raise CorruptModel(f"{cfg.where}: width {hidden} does not divide into {heads} heads")
        head_dim = hidden // heads
    own_tied = cfg.flag("tie_word_embeddings", False)
    return Decoder(
        hidden=hidden,
        layers=cfg.integer("num_hidden_layers"),
        vocab=cfg.integer("vocab_size"),
        context=cfg.integer("max_position_embeddings"),
        tied_embedding=own_tied if tied is None else tied or own_tied,
        embedding_scale=1.0,
        norm=Norm("rms", cfg.number("rms_norm_eps", 1e-6)),
        attention=Attention(
            heads=heads,
            kv_heads=cfg.integer("num_key_value_heads", heads),
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            output_bias=output_bias,
            scale=head_dim**-0.5,
        ),
        rope=read_rope(cfg, head_dim),
        mlp=Mlp(
            "gated",
            cfg.choice("hidden_act", ACTIVATIONS, "silu"),
            cfg.integer("intermediate_size"),
            mlp_bias,
        ),
    )


def decoder_rules(body: str, head: str) -> list[Rule]:
    """Rules of such a decoder whose tensors start with `body` ("model."), and of its head."""
    layer, slot = body + "layers.{n}.", "decoder.layers.{n}."
    return [
        Rule(body + "embed_tokens.weight", "decoder.embedding.weight"),
        Rule(layer + "input_layernorm.weight", slot + "attention_norm.weight"),
        Rule(layer + "self_attn.q_proj.{p}", slot + "attention.q.{p}"),
        Rule(layer + "self_attn.k_proj.{p}", slot + "attention.k.{p}"),
        Rule(layer + "self_attn.v_proj.{p}", slot + "attention.v.{p}"),
        Rule(layer + "self_attn.o_proj.{p}", slot + "attention.o.{p}"),
        Rule(layer + "post_attention_layernorm.weight", slot + "mlp_norm.weight"),
        Rule(layer + "mlp.gate_proj.{p}", slot + "mlp.gate.{p}"),
        Rule(layer + "mlp.up_proj.{p}", slot + "mlp.up.{p}"),
        Rule(layer + "mlp.down_proj.{p}", slot + "mlp.down.{p}"),
        Rule(body + "norm.weight", "decoder.final_norm.weight"),
        Rule(head + ".weight", "decoder.head.weight"),
    ]


def decoder_left_out(body: str, head: str, tied: bool) -> list[LeaveOut]:
    """Tensors of such a decoder that say nothing new."""
    result = [
        LeaveOut(body + "layers.{n}.self_attn.rotary_emb.inv_freq", "follows from the rotary base"),
        LeaveOut(body + "rotary_emb.inv_freq", "follows from the rotary base"),
    ]
    if tied:
        result.append(LeaveOut(head + ".weight", "the embedding is the head as well"))
    return result
