"""Writes the checkpoint in the Hugging Face layout of LLaVA-Video (Qwen2 LM, SigLIP tower)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framequilt.demo.model import DemoConfig, DemoModel
from framequilt.demo.runstate import load_state
from framequilt.demo.tokenizer import Prompts, tokenizer_files

TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
MAX_BYTES = 16 * 2**20


def hf_config(
    config: DemoConfig, prompts: Prompts, threshold: float | None = None
) -> dict[str, Any]:
    """config.json: Qwen2 keys, LLaVA keys and a nested SigLIP vision_config.

    `threshold` is FrameFusion's for this model (`evaluate` measures it); the converter records it.
    """
    fusion = {} if threshold is None else {"framefusion_similarity_lower_bound": threshold}
    return {
        **fusion,
        "architectures": ["LlavaQwenForCausalLM"],
        "model_type": "llava_qwen",
        "hidden_size": config.width,
        "intermediate_size": config.mlp,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "initializer_range": 0.02,
        "rms_norm_eps": config.eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "use_sliding_window": False,
        "sliding_window": None,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "vocab_size": config.vocab,
        "bos_token_id": prompts.pad,
        "eos_token_id": prompts.end,
        "pad_token_id": prompts.pad,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "image_token_index": prompts.encode("<image>")[0],
        "mm_vision_tower": "framequilt-demo-siglip-shaped-patch8-64",
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": config.tower_width,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_spatial_pool_mode": "bilinear",
        "mm_spatial_pool_stride": 2,
        "mm_newline_position": "grid",
        "mm_patch_merge_type": "spatial_unpad",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "square",
        "add_time_instruction": False,
        "force_sample": True,
        "max_frames_num": 32,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": config.tower_width,
            "intermediate_size": config.tower_mlp,
            "num_hidden_layers": config.tower_layers + 1,
            "num_attention_heads": config.tower_heads,
            "num_channels": 3,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu_pytorch_tanh",
            "attention_dropout": 0.0,
        },
    }


def preprocessor_config(config: DemoConfig) -> dict[str, Any]:
    """SigLIP's preprocessing at the demo's size."""
    return {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "size": {"height": config.image_size, "width": config.image_size},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "do_convert_rgb": True,
    }


def hf_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """DemoModel names -> published LLaVA-Video names."""
    out: dict[str, Tensor] = {}
    for name, weight in state.items():
        if name.startswith("language.lm_head."):
            out[name.removeprefix("language.")] = weight
        elif name.startswith("language."):
            out["model." + name.removeprefix("language.")] = weight
        elif name.startswith("vision.projector."):
            out["model.mm_projector." + name.removeprefix("vision.projector.")] = weight
        elif name == "vision.image_newline":
            out["model.image_newline"] = weight
        elif name.startswith("vision.tower.layers."):
            out[TOWER_PREFIX + "encoder." + name.removeprefix("vision.tower.")] = weight
        else:
            out[TOWER_PREFIX + "embeddings." + name.removeprefix("vision.tower.")] = weight
    return out


def own_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `hf_names`."""
    out: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        if name.startswith(TOWER_PREFIX + "embeddings."):
            out["vision.tower." + name.removeprefix(TOWER_PREFIX + "embeddings.")] = weight
        elif name.startswith(TOWER_PREFIX):
            out["vision.tower." + name.removeprefix(TOWER_PREFIX + "encoder.")] = weight
        elif name.startswith("model.mm_projector."):
            out["vision.projector." + name.removeprefix("model.mm_projector.")] = weight
        elif name == "model.image_newline":
            out["vision.image_newline"] = weight
        elif name.startswith("model."):
            out["language." + name.removeprefix("model.")] = weight
        else:
            out["language." + name] = weight
    return out


def export(model: DemoModel, prompts: Prompts, folder: Path, threshold: float | None = None) -> int:
    """Writes every file of the checkpoint but the model card; returns the bytes of the weights."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in hf_names(model.state_dict()).items()
    }
    target = folder / "model.safetensors"
    save_file(tensors, str(target), metadata={"format": "pt"})
    for name, text in tokenizer_files(prompts.tokenizer).items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    for name, value in (
        ("config.json", hf_config(model.config, prompts, threshold)),
        ("preprocessor_config.json", preprocessor_config(model.config)),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    target.chmod(0o644)
    size = target.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"export: {target} has {size} bytes, more than {MAX_BYTES}")
    return size


def load_checkpoint(folder: Path) -> tuple[DemoModel, Prompts]:
    """Reads a checkpoint folder back into the training-side model, float32."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vision = config["vision_config"]
    sizes = DemoConfig(
        image_size=vision["image_size"],
        patch_size=vision["patch_size"],
        tower_width=vision["hidden_size"],
        tower_layers=vision["num_hidden_layers"] - 1,
        tower_heads=vision["num_attention_heads"],
        tower_mlp=vision["intermediate_size"],
        width=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        mlp=config["intermediate_size"],
        vocab=config["vocab_size"],
        rope_theta=config["rope_theta"],
        eps=config["rms_norm_eps"],
    )
    model = DemoModel(sizes)
    tensors = own_names(load_file(str(folder / "model.safetensors")))
    model.load_state_dict({name: weight.float() for name, weight in tensors.items()})
    return model.eval(), Prompts.from_folder(folder)


def main() -> None:
    """Command line: RUN/lm.pt -> checkpoint folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--state", default="lm.pt", help="file in the run folder")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--threshold", type=float, help="FrameFusion's, as `evaluate` prints it")
    args = parser.parse_args()
    state = load_state(args.run / args.state)
    if state is None:
        raise SystemExit(f"export: no {args.state} in {args.run}")
    model = DemoModel(DemoConfig(**state["config"]))
    model.load_state_dict(state["model"])
    size = export(model, Prompts.of_run(args.run), args.out, args.threshold)
    print(f"{size} bytes of weights in {args.out}")


if __name__ == "__main__":
    main()
