"""LLaVA-Video and LLaVA-OneVision: a SigLIP tower, a two-layer projector, a Qwen2 decoder.

Two layouts of the same model:

* `ORIGINAL` (LlavaQwenForCausalLM): flat config with `mm_*` keys; the tower's sizes come from a
  nested `vision_config`, or from the table below when `mm_vision_tower` names a known one. A video
  is pooled as `mm_spatial_pool_mode` says and gets newlines as `mm_newline_position` says.
* `ONEVISION` (LlavaOnevisionForConditionalGeneration): nested configs; a video is pooled bilinearly
  to ceil(grid / 2) and gets one newline at its very end; `vision_feature_layer` counts hidden
  states, which are taken before the tower's last norm (checked against transformers 5.23).

The chat template's output has one placeholder, `<image>`, for images and videos alike: `<video>` in
a template is rewritten.
"""

from __future__ import annotations

import re
from typing import Any

from framequilt.convert.config_reader import ConfigReader
from framequilt.convert.families import qwen2
from framequilt.convert.families.base import (
    Description,
    Family,
    decoder_left_out,
    decoder_rules,
)
from framequilt.convert.rules import LeaveOut, Rule
from framequilt.convert.sources import Source
from framequilt.convert.spec import (
    ACTIVATIONS,
    Attention,
    Decoder,
    Mlp,
    Model,
    Norm,
    Projector,
    Vision,
    Visual,
)
from framequilt.errors import CorruptModel, Unsupported

MEDIA = "<image>"

# What is public about the towers that original configs only name.
_TOWERS: dict[str, dict[str, Any]] = {
    "siglip-so400m-patch14-384": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 384,
        "patch_size": 14,
    },
}
_NEWLINES = {"grid": "grid", "frame": "frame", "one_token": "one_token", "no_token": "none"}
_POOLS = {"bilinear": "bilinear", "average": "average", "max": "max"}

# Keys of original configs that matter in training or in other programs only.
_TRAINING = (
    "delay_load", "faster_token_stride", "force_sample", "frames_upbound",
    "freeze_mm_mlp_adapter", "ignore_index", "image_crop_resolution", "image_split_resolution",
    "image_token_index", "max_frames_num", "mm_hidden_size", "mm_perceiver_depth",
    "mm_projector_lr", "mm_resampler_type", "mm_tunable_parts", "mm_vision_tower_lr",
    "mm_vision_tower_name", "pos_skipping_range", "tokenizer_model_max_length",
    "tokenizer_padding_side", "tune_mm_mlp_adapter", "unfreeze_mm_vision_tower", "use_mm_proj",
    "video_fps", "vision_tower_pretrained",
)  # fmt: skip


def read_tower(cfg: ConfigReader, select: int) -> tuple[Vision, int]:
    """The tower up to hidden state `select` (0 is the embedding, negative counts from the end).

    Returns it and the number of layers in the checkpoint. Errors: those of the reader, Unsupported.
    """
    cfg.require("model_type", "siglip_vision_model", reason="the tower has to be a SigLIP")
    hidden, heads = cfg.integer("hidden_size"), cfg.integer("num_attention_heads")
    total = cfg.integer("num_hidden_layers")
    layers = select if select >= 0 else total + 1 + select
    if not 1 <= layers <= total:
        raise Unsupported(f"{cfg.where}: hidden state {select} of a tower of {total} layers")
    image, patch = cfg.integer("image_size"), cfg.integer("patch_size")
    if hidden % heads or patch > image:
        raise CorruptModel(
            f"{cfg.where}: width {hidden} with {heads} heads, patch {patch} of an image of {image}"
        )
    cfg.ignore("vision_use_head")  # the pooling head is not used for features
    tower = Vision(
        image_size=image,
        patch=patch,
        channels=cfg.integer("num_channels", 3),
        hidden=hidden,
        layers=layers,
        patch_bias=True,
        post_norm=False,
        norm=Norm("layer", cfg.number("layer_norm_eps", 1e-6)),
        attention=Attention(heads, heads, hidden // heads, True, True, (hidden // heads) ** -0.5),
        mlp=Mlp(
            "plain",
            cfg.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
            cfg.integer("intermediate_size"),
            True,
        ),
    )
    cfg.finish()
    return tower, total


def _projector(tower: Vision, decoder: Decoder, activation: str) -> Projector:
    return Projector("mlp", tower.hidden, decoder.hidden, decoder.hidden, activation)


def tower_rules(at: str) -> list[Rule]:
    """Rules of a SigLIP tower whose tensors start with `at`."""
    layer, slot = at + "encoder.layers.{n}.", "vision.layers.{n}."
    return [
        Rule(at + "embeddings.patch_embedding.{p}", "vision.patch_embedding.{p}"),
        Rule(at + "embeddings.position_embedding.weight", "vision.position"),
        Rule(layer + "layer_norm1.{p}", slot + "attention_norm.{p}"),
        Rule(layer + "self_attn.q_proj.{p}", slot + "attention.q.{p}"),
        Rule(layer + "self_attn.k_proj.{p}", slot + "attention.k.{p}"),
        Rule(layer + "self_attn.v_proj.{p}", slot + "attention.v.{p}"),
        Rule(layer + "self_attn.out_proj.{p}", slot + "attention.o.{p}"),
        Rule(layer + "layer_norm2.{p}", slot + "mlp_norm.{p}"),
        Rule(layer + "mlp.fc1.{p}", slot + "mlp.up.{p}"),
        Rule(layer + "mlp.fc2.{p}", slot + "mlp.down.{p}"),
    ]


def tower_left_out(at: str, tower: Vision, total: int) -> list[LeaveOut]:
    """What features before the last norm do not need."""
    result = [
        LeaveOut(at + "post_layernorm.{p}", "features are taken before the last norm"),
        LeaveOut(at + "head.{*}", "the pooling head is not used"),
        LeaveOut(at + "embeddings.position_ids", "positions are the patches in order"),
    ]
    for n in range(tower.layers, total):
        result.append(LeaveOut(f"{at}encoder.layers.{n}.{{*}}", "features are taken before it"))
    return result


def max_tiles(aspect: str, where: str) -> int:
    """Tiles of `anyres_max_N`; plain `anyres` never shrinks, and `square` images have no tiles.

    Errors: Unsupported.
    """
    if aspect in ("anyres", "square"):
        return 0
    match = re.fullmatch(r"anyres_max_([0-9]{1,4})", aspect)
    if match is None or int(match[1]) == 0:
        raise Unsupported(
            f"{where}: image layout {aspect!r}", "known: square, anyres, anyres_max_N"
        )
    return int(match[1])


def pinpoints(value: Any, size: int, swap: bool, where: str) -> list[list[int]] | None:
    """Image grids as [[height, width], ...] in pixels.

    `value` is a list of pairs (`swap`: widths first) or a text such as "(1x1),...,(6x6)", which
    counts tiles of `size` pixels. Errors: CorruptModel.
    """
    if value is None:
        return None
    if isinstance(value, str):
        ends = [(int(a), int(b)) for a, b in re.findall(r"\(([0-9]{1,3})x([0-9]{1,3})\)", value)]
        if not ends:
            raise CorruptModel(f"{where}: image_grid_pinpoints is {value!r}")
        (first_a, first_b), (last_a, last_b) = ends[0], ends[-1]
        pairs = [(a, b) for a in range(first_a, last_a + 1) for b in range(first_b, last_b + 1)]
        return [[b * size, a * size] for a, b in pairs]
    fine = isinstance(value, list) and all(
        isinstance(pair, list | tuple)
        and len(pair) == 2
        and all(type(n) is int and n > 0 and n % size == 0 for n in pair)
        for pair in value
    )
    if not fine:
        raise CorruptModel(f"{where}: image_grid_pinpoints is {value!r}"[:200])
    return [[pair[1], pair[0]] if swap else [pair[0], pair[1]] for pair in value]


_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def read_preprocessor(
    source: Source, size: int, grids: list[list[int]] | None, time_instruction: bool
) -> dict[str, Any]:
    """preprocessor.json: SigLIP's usual numbers unless the checkpoint's own file says otherwise.

    Errors: Unsupported for steps that the front end does not do.
    """
    values = source.json("preprocessor_config.json")
    if not values:
        nested = source.json("processor_config.json").get("image_processor")
        values = nested if isinstance(nested, dict) else {}
    cfg = ConfigReader(values, f"{source.path.name}: preprocessor_config.json")
    for step in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        cfg.require(step, True, reason="this step is part of what the model was trained with")
    cfg.require("do_center_crop", False, reason="images are resized, not cropped")
    resample = cfg.integer("resample", 3, minimum=0)
    if resample not in _RESAMPLE:
        raise Unsupported(f"{cfg.where}: resample is {resample}")
    wanted = cfg.raw("size") or {}
    if not isinstance(wanted, dict) or any(
        wanted.get(key) not in (None, size) for key in ("height", "width", "shortest_edge")
    ):
        raise Unsupported(f"{cfg.where}: size is {wanted!r}", f"the tower takes {size} x {size}")

    def triple(key: str) -> list[float]:
        value = cfg.raw(key)
        value = [0.5, 0.5, 0.5] if value is None else value
        numbers = isinstance(value, list) and all(type(v) in (int, float) for v in value)
        if not numbers or len(value) != 3:
            raise CorruptModel(f"{cfg.where}: {key} is {value!r}, not three numbers")
        return [float(v) for v in value]

    return {
        "size": size,
        "resample": _RESAMPLE[resample],
        "mean": triple("image_mean"),
        "std": triple("image_std"),
        "rescale": cfg.number("rescale_factor", 1 / 255),
        "image_grid_pinpoints": grids,
        "time_instruction": time_instruction,
    }


def describe_original(source: Source) -> Description:
    """Reads a flat config with mm_* keys. Errors: those of `ConfigReader`."""
    cfg = ConfigReader(source.config, f"{source.path.name}: config.json")
    decoder = qwen2.read(cfg)
    name = cfg.text("mm_vision_tower", "")
    known = next((sizes for key, sizes in _TOWERS.items() if name.endswith(key)), None)
    # Some published configs carry the defaults of another class, a CLIP tower among them, that the
    # model never reads; the tower it loads is the named one.
    nested = cfg.sub("vision_config") if "vision_config" in cfg else None
    if nested is not None and nested.values.get("model_type") == "siglip_vision_model":
        part = nested
    elif known is not None:
        part = ConfigReader(known, f"{cfg.where}: {name}")
    else:
        raise Unsupported(
            f"{cfg.where}: the sizes of the tower {name!r} are not known",
            f"known: {', '.join(_TOWERS)}; or a SigLIP vision_config in config.json",
        )
    cfg.ignore("text_config", "vision_feature_layer", "vision_feature_select_strategy")
    cfg.require("projector_hidden_act", "gelu", reason="mlp2x_gelu has a GELU")
    tower, total = read_tower(part, cfg.integer("mm_vision_select_layer", -2, minimum=-1024))
    cfg.require("mm_vision_select_feature", "patch", reason="only patch features are supported")
    cfg.require("mm_projector_type", "mlp2x_gelu", reason="only mlp2x_gelu is supported")
    cfg.require("mm_use_im_start_end", False, reason="start and end tokens are not supported")
    cfg.require("mm_use_im_patch_token", False, reason="patch tokens are not supported")
    cfg.require("mm_patch_merge_type", "spatial_unpad", reason="only spatial_unpad is supported")
    cfg.require("add_faster_video", False, reason="slow and fast frames are not supported")
    cfg.require("use_pos_skipping", False, reason="position skipping is for training")
    cfg.ignore(*_TRAINING)
    pool = cfg.choice("mm_spatial_pool_mode", _POOLS, "bilinear")
    stride = cfg.integer("mm_spatial_pool_stride", 2)
    newline = cfg.choice("mm_newline_position", _NEWLINES, "one_token")
    aspect = cfg.text("image_aspect_ratio", "anyres_max_9")
    tiles = max_tiles(aspect, cfg.where)
    grids = pinpoints(cfg.raw("image_grid_pinpoints"), tower.image_size, True, cfg.where)
    if aspect == "square":  # resized as it is, whatever grids are listed
        grids = None
    times = cfg.flag("add_time_instruction", False)
    # No published config says it; one that was measured for its own model (the median cosine at the
    # first layer) may. 0.6 is what FrameFusion's authors use for the released models.
    similarity = cfg.number("framefusion_similarity_lower_bound", 0.6)
    cfg.finish()
    at = "model.vision_tower.vision_tower.vision_model."
    rules = decoder_rules("model.", "lm_head") + tower_rules(at)
    rules += [
        Rule("model.mm_projector.0.{p}", "projector.layers.0.{p}"),
        Rule("model.mm_projector.2.{p}", "projector.layers.1.{p}"),
        Rule("model.image_newline", "visual.newline"),
    ]
    left_out = decoder_left_out("model.", "lm_head", decoder.tied_embedding)
    visual = Visual(pool if stride > 1 else "none", stride, newline, True, tiles)  # type: ignore[arg-type]
    return Description(
        Model(decoder, tower, _projector(tower, decoder, "gelu"), visual),
        rules,
        left_out + tower_left_out(at, tower, total),
        text_config=source.config,
        media=MEDIA,
        template_changes={"<video>": MEDIA},
        preprocessor=read_preprocessor(source, tower.image_size, grids, times),
        similarity_lower_bound=similarity,
    )


def describe_onevision(source: Source) -> Description:
    """Reads nested configs. Errors: those of `ConfigReader`."""
    cfg = ConfigReader(source.config, f"{source.path.name}: config.json")
    text = cfg.sub("text_config")
    text.require("model_type", "qwen2", reason="the decoder has to be a Qwen2")
    decoder = qwen2.read(text, cfg.flag("tie_word_embeddings", False))
    text.finish()
    select = cfg.raw("vision_feature_layer")
    if select is not None and type(select) is not int:
        raise Unsupported(f"{cfg.where}: vision_feature_layer is {select!r}, not one layer")
    tower, total = read_tower(cfg.sub("vision_config"), -1 if select is None else select)
    cfg.require("vision_feature_select_strategy", "full", reason="the tower has no class token")
    activation = cfg.choice("projector_hidden_act", ACTIVATIONS, "gelu")
    tiles = max_tiles(cfg.text("vision_aspect_ratio", "anyres_max_9"), cfg.where)
    value = cfg.raw("image_grid_pinpoints")
    size = tower.image_size
    if value is None:  # the class's default
        value = [[a * size, b * size] for a in range(1, 7) for b in range(1, 7)]
    grids = pinpoints(value, size, False, cfg.where)
    # The ids of the two placeholders; media parts are replaced before the text becomes tokens.
    cfg.ignore("image_token_index", "video_token_index", "image_token_id", "video_token_id")
    cfg.ignore("use_image_newline_parameter", "ignore_index")
    has_bias = cfg.flag("multimodal_projector_bias", True)
    cfg.finish()
    rules: list[Rule] = []
    left_out: list[LeaveOut] = []
    tied = decoder.tied_embedding
    for body, head, outer in (
        ("language_model.model.", "language_model.lm_head", ""),
        ("model.language_model.", "lm_head", "model."),
    ):
        rules += decoder_rules(body, head)
        left_out += decoder_left_out(body, head, tied)
        for at in (f"{outer}vision_tower.", f"{outer}vision_tower.vision_model."):
            rules += tower_rules(at)
            left_out += tower_left_out(at, tower, total)
        rules += [
            Rule(outer + "multi_modal_projector.linear_1.{p}", "projector.layers.0.{p}"),
            Rule(outer + "multi_modal_projector.linear_2.{p}", "projector.layers.1.{p}"),
            Rule(outer + "image_newline", "visual.newline"),
        ]
    zero = [] if has_bias else ["projector.layers.0.bias", "projector.layers.1.bias"]
    visual = Visual("bilinear", 2, "one_token", True, tiles)
    return Description(
        Model(decoder, tower, _projector(tower, decoder, activation), visual),
        rules,
        left_out,
        zero_filled=zero,
        text_config=text.values,
        media=MEDIA,
        template_changes={"<video>": MEDIA},
        preprocessor=read_preprocessor(source, size, grids, False),
    )


ORIGINAL = Family("llava_video", ("LlavaQwenForCausalLM",), ("llava_qwen",), describe_original)
ONEVISION = Family(
    "llava_onevision",
    ("LlavaOnevisionForConditionalGeneration",),
    ("llava_onevision",),
    describe_onevision,
)
