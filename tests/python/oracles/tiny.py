"""Tiny random checkpoints in published layouts, saved with transformers.

Each function writes a checkpoint with tokenizer and chat template to `path` and returns the
transformers model in float32 (eval mode) that holds exactly the weights in the files, so that it is
the oracle of whatever reads them. With `bf16=True` (default) weights are rounded to bfloat16 values
first and stored so; storing them as bf16 again loses nothing.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The released template of the transformers layout, in its structure: media parts first, then text.
CHATML_PARTS = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + ' '}}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>\n' }}{% endfor %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] }}{% endfor %}{{'<|im_end|>'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")
PRETOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXT = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'\"()[]{}<>|_-+*/=\n\t"


def write_tokenizer(
    path: Path, vocab: int = 131, *, bos: str | None = None, eos: str = "<|im_end|>",
    chat_template: str | None = CHATML,
) -> Tokenizer:  # fmt: skip
    """A byte-level BPE tokenizer of at most `vocab` tokens, the special ones (`SPECIAL`) first.

    It has single characters of `TEXT` and a few merges; other characters give no token. With `bos`
    it
    prepends that token, as LLaMA tokenizers do. Writes tokenizer.json and tokenizer_config.json.
    """
    path.mkdir(parents=True, exist_ok=True)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = sorted({piece[0][0] for c in TEXT for piece in [level.pre_tokenize_str(c)]})
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("Ġ", "a"), ("e", "r")]
    tokens = [*SPECIAL, *letters, *(left + right for left, right in merges)][:vocab]
    table = {token: n for n, token in enumerate(tokens)}
    usable = [pair for pair in merges if {*pair, "".join(pair)} <= set(table)]
    tokenizer = Tokenizer(models.BPE(vocab=table, merges=usable))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRETOKENIZER), "isolated"), level]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token in SPECIAL if token in table])
    if bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, table[bos])]
        )
    tokenizer.save(str(path / "tokenizer.json"))
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    settings["bos_token"] = bos
    if chat_template is not None:
        settings["chat_template"] = chat_template
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer


def randomize(model: nn.Module, seed: int, bf16: bool) -> None:
    """Seeded weights of a size at which every block matters: norms near 1, biases not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                is_norm = "norm" in name and name.endswith("weight")
                weight.copy_(noise * 0.1 + (1.0 if is_norm else 0.0))
            elif "embed" in name:
                weight.copy_(noise * 0.5)
            else:
                fan_in = weight[0].numel()
                weight.copy_(noise * fan_in**-0.5)
            if bf16:
                weight.copy_(weight.to(torch.bfloat16).float())


def _save(model: Any, path: Path, bf16: bool, **options: Any) -> None:
    """Writes the files in bf16 or float32.

    A copy is converted: the rotary frequencies of the model itself have to stay in float32.
    """
    stored = copy.deepcopy(model).to(torch.bfloat16) if bf16 else model
    stored.save_pretrained(path, **options)
    model.eval()


def _sizes(**changes: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 112,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 131,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    return sizes | changes


def tiny_llama(
    path: Path,
    seed: int = 0,
    *,
    bf16: bool = True,
    save: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A LlamaForCausalLM; `changes` go to LlamaConfig, `save` to save_pretrained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**_sizes(bos_token_id=0, **changes)))
    randomize(model, seed, bf16)
    _save(model, path, bf16, **(save or {}))
    write_tokenizer(path, model.config.vocab_size, bos="<|endoftext|>")
    return model


def tiny_mistral(path: Path, seed: int = 0, *, bf16: bool = True, **changes: Any) -> Any:
    """A MistralForCausalLM without a window; `changes` go to MistralConfig."""
    from transformers import MistralConfig, MistralForCausalLM

    sizes = _sizes(**{"sliding_window": None, "bos_token_id": 0, **changes})
    model = MistralForCausalLM(MistralConfig(**sizes))
    randomize(model, seed, bf16)
    _save(model, path, bf16)
    write_tokenizer(path, model.config.vocab_size, bos="<|endoftext|>")
    return model


def tiny_qwen2(
    path: Path,
    seed: int = 0,
    *,
    bf16: bool = True,
    save: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A Qwen2ForCausalLM with a tied embedding; `changes` go to Qwen2Config."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = _sizes(**{"tie_word_embeddings": True, **changes})
    model = Qwen2ForCausalLM(Qwen2Config(**sizes))
    randomize(model, seed, bf16)
    _save(model, path, bf16, **(save or {}))
    write_tokenizer(path, model.config.vocab_size)
    return model


def _tower(**changes: Any) -> dict[str, Any]:
    sizes: dict[str, Any] = {
        "model_type": "siglip_vision_model",
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "image_size": 28,
        "patch_size": 7,
        "num_channels": 3,
        "vision_use_head": False,
    }
    return sizes | changes


def tiny_llava_onevision(
    path: Path,
    seed: int = 0,
    *,
    bf16: bool = True,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **changes: Any,
) -> Any:
    """A LlavaOnevisionForConditionalGeneration: images of 28 x 28 in patches of 7.

    `vision`, `text` and `changes` go to the three configs. Token 3 is <image>, token 4 <video>.
    """
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    tower = _tower(**(vision or {}))
    size = tower["image_size"]
    settings: dict[str, Any] = {
        "vision_config": tower,
        "text_config": _sizes(model_type="qwen2", **(text or {})),
        "image_token_index": 3,
        "video_token_index": 4,
        "vision_feature_layer": -1,
        "vision_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[a * size, b * size] for a in (1, 2, 3) for b in (1, 2, 3)],
        **changes,
    }
    model = LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**settings))
    randomize(model, seed, bf16)
    _save(model, path, bf16)
    write_tokenizer(path, model.config.text_config.vocab_size, chat_template=None)
    (path / "chat_template.jinja").write_text(CHATML_PARTS)
    processor = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": size, "width": size},
    }
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


class OriginalLlavaVideo(nn.Module):
    """The pieces of the original layout, each a transformers module, and the glue between them."""

    def __init__(self, decoder: Any, tower: Any, projector: nn.Sequential, newline: nn.Parameter):
        super().__init__()
        self.decoder, self.tower = decoder, tower
        self.projector, self.image_newline = projector, newline
        self.pool = "bilinear"
        self.newline = "grid"

    def frame_rows(self, pixels: torch.Tensor) -> torch.Tensor:
        """[frames, 3, size, size] -> the rows of a video [rows, hidden].

        Tower without its last layer and last norm, projector, pooling with stride 2, newlines.
        """
        states = self.tower(pixels, output_hidden_states=True).hidden_states[-2]
        maps = self.projector(states)
        frames, patches, hidden = maps.shape
        grid = round(patches**0.5)
        maps = maps.view(frames, grid, grid, hidden).permute(0, 3, 1, 2)
        if self.pool == "bilinear":
            half = -(-grid // 2)
            maps = nn.functional.interpolate(maps, size=(half, half), mode="bilinear")
        elif self.pool == "average":
            maps = nn.functional.avg_pool2d(maps, 2)
        else:
            maps = nn.functional.max_pool2d(maps, 2)
        rows = maps.permute(0, 2, 3, 1)
        if self.newline == "grid":
            end = self.image_newline.expand(frames, rows.shape[1], 1, hidden)
            return torch.cat([rows, end], 2).reshape(-1, hidden)
        rows = rows.reshape(frames, -1, hidden)
        if self.newline == "frame":
            rows = torch.cat([rows, self.image_newline.expand(frames, 1, hidden)], 1)
        rows = rows.reshape(-1, hidden)
        return torch.cat([rows, self.image_newline[None]]) if self.newline == "one_token" else rows


def tiny_llava_video_original(
    path: Path,
    seed: int = 0,
    *,
    bf16: bool = True,
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    **changes: Any,
) -> OriginalLlavaVideo:
    """The LlavaQwenForCausalLM layout (flat config, mm_* keys, nested vision_config).

    `changes` go to config.json. The tower in the files has one layer more than runs.
    """
    from safetensors.torch import save_file
    from transformers import Qwen2Config, Qwen2ForCausalLM, SiglipVisionConfig, SiglipVisionModel

    tower_sizes = _tower(**(vision or {}))
    sizes = _sizes(**(text or {}))
    settings = {key: value for key, value in tower_sizes.items() if key != "model_type"}
    tower = SiglipVisionModel(SiglipVisionConfig(**settings))
    decoder = Qwen2ForCausalLM(Qwen2Config(**sizes))
    width, hidden = tower_sizes["hidden_size"], sizes["hidden_size"]
    projector = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, hidden))
    model = OriginalLlavaVideo(decoder, tower, projector, nn.Parameter(torch.zeros(hidden)))
    randomize(model, seed, bf16)
    model.float().eval()
    stored = {f"{name}": weight for name, weight in decoder.state_dict().items()}
    if sizes["tie_word_embeddings"]:
        stored.pop("lm_head.weight", None)
    at = "model.vision_tower.vision_tower.vision_model."
    for name, weight in tower.state_dict().items():
        stored[at + name.removeprefix("vision_model.")] = weight
    for name, weight in projector.state_dict().items():
        stored[f"model.mm_projector.{name}"] = weight
    stored["model.image_newline"] = model.image_newline.data
    kind = torch.bfloat16 if bf16 else torch.float32
    path.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: weight.detach().to(kind).contiguous() for name, weight in stored.items()},
        path / "model.safetensors",
        metadata={"format": "pt"},
    )
    size = tower_sizes["image_size"]
    config: dict[str, Any] = {
        **sizes,
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": 131072,
        "max_window_layers": 28,
        "mm_vision_tower": "tiny-siglip",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_newline_position": "grid",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_hidden_size": width,
        "image_aspect_ratio": "anyres_max_9",
        "image_grid_pinpoints": [[a * size, b * size] for a in (1, 2, 3) for b in (1, 2, 3)],
        "add_faster_video": False,
        "add_time_instruction": True,
        "tokenizer_model_max_length": 32768,
        "torch_dtype": "bfloat16",
        "vision_config": tower_sizes,
        **changes,
    }
    # transformers keeps the base in rope_parameters: the oracle has to rotate as the file says.
    rotary = decoder.model.rotary_emb
    half = torch.arange(0, hidden // sizes["num_attention_heads"], 2, dtype=torch.float32)
    inverse = config["rope_theta"] ** (-half / (2 * len(half)))
    rotary.inv_freq = inverse
    rotary.original_inv_freq = inverse
    decoder.config.rope_parameters = {"rope_theta": config["rope_theta"], "rope_type": "default"}
    (path / "config.json").write_text(json.dumps(config, indent=1))
    write_tokenizer(path, sizes["vocab_size"])
    model.pool = config["mm_spatial_pool_mode"]
    model.newline = config["mm_newline_position"]
    return model
