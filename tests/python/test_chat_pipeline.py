"""From messages and pictures to model input, against transformers' processor of the same model."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from oracles import tiny

from framequilt.chat import ChatTemplate
from framequilt.convert import convert
from framequilt.model_directory import ModelDirectory
from framequilt.tokenizer import Tokenizer
from framequilt.vision import Preprocessor


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("onevision") / "checkpoint"
    return path, tiny.tiny_llava_onevision(path)


@pytest.fixture(scope="module")
def ours(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("converted") / "model"
    convert(checkpoint[0], path, weights="bf16")
    config = ModelDirectory(path).config
    tokens = config["tokens"]
    tokenizer = Tokenizer.open(path, tokens["tokenizer"])
    template = (path / "chat_template.jinja").read_text(encoding="utf-8")
    chat = ChatTemplate(
        tokenizer,
        template,
        media=tokens["media"],
        bos=tokens["bos"],
        add_bos=tokens["add_bos"],
        eos=tokens["eos"],
    )
    return chat, Preprocessor.open(path, config["vision"]["patch"])


def processor(checkpoint):
    from transformers.models.llava_onevision import image_processing_pil_llava_onevision as pil

    path, model = checkpoint
    size = model.config.vision_config.image_size
    images = pil.LlavaOnevisionImageProcessorPil(
        size={"height": size, "width": size},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
        image_grid_pinpoints=model.config.image_grid_pinpoints,
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    return images, tokenizer, (path / "chat_template.jinja").read_text()


@pytest.mark.parametrize("size", [(28, 28), (60, 100), (100, 31)])
def test_one_picture_gives_the_ids_and_the_pixels_of_the_reference(checkpoint, ours, size):
    images, tokenizer, template = processor(checkpoint)
    chat, preprocessor = ours
    pixels = np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8)
    parts = [{"type": "image"}, {"type": "text", "text": "What is the sign in the picture?"}]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": parts}],
        chat_template=template,
        tokenize=False,
        add_generation_prompt=True,
    )
    want = tokenizer(text, add_special_tokens=False)["input_ids"]
    media = tokenizer.convert_tokens_to_ids("<image>")
    parts[0] = {"type": "image", "image": pixels}
    assert chat.encode([{"role": "user", "content": parts}]) == [
        -1 if i == media else i for i in want
    ]
    got = preprocessor.image(pixels)
    np.testing.assert_array_equal(got.data, images(pixels, return_tensors="np")["pixel_values"][0])


@pytest.mark.parametrize("size", [(28, 28), (60, 100), (100, 31), (300, 28)])
def test_tiles_and_crop_give_the_row_count_of_the_reference(checkpoint, ours, size):
    model = checkpoint[1]
    pixels = np.zeros((*size, 3), np.uint8)
    got = ours[1].image(pixels)
    width = model.config.text_config.hidden_size
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    features = torch.zeros(len(got.data), side * side, width)
    _, lengths = model.model.pack_image_features(
        [features], torch.tensor([size]), image_newline=torch.zeros(width)
    )
    _, _, _, _, height, width_of_crop = got.tiles
    ratio = (height * width_of_crop / (9 * side**2)) ** 0.5
    if ratio > 1.1:  # the engine shrinks larger maps, as the reference does
        height, width_of_crop = int(height // ratio), int(width_of_crop // ratio)
    assert side * side + height * (width_of_crop + 1) == int(lengths[0])
