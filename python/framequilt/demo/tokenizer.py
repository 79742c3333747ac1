"""The byte-level BPE tokenizer of the demo model and its ChatML prompt.

Special tokens come first after training so that ids are stable: see SPECIAL.
"""

from __future__ import annotations

import itertools
import json
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from framequilt.demo.questions import NUMBERS, PARTS, TEMPLATES
from framequilt.demo.world import COLOURS, DIRECTIONS, SHAPES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>")
VOCAB_SIZE = 512
SYSTEM = "You are a helpful assistant."
PREFIX = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + SYSTEM + "<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] in ['image', 'image_url', 'video', 'video_url'] %}{{ '<image>\\n' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def corpus() -> list[str]:
    """Every question wording and answer word, the text the merges are learned from."""
    names = [f"{c} {s}" for c, s in itertools.product(COLOURS, SHAPES)]
    texts = [PREFIX + "\n", "<|im_end|>\n<|im_start|>assistant\n"] * 40
    for template in itertools.chain.from_iterable(TEMPLATES.values()):
        for x, y in zip(names, reversed(names), strict=True):
            texts.append("\n" + template.format(x=x, y=y))
        for word in (*COLOURS, *SHAPES):
            texts.append("\n" + template.format(x=word, y=word))
    words = [*names, *COLOURS, *SHAPES, *DIRECTIONS, *NUMBERS, *PARTS]
    words += ["yes", "no", "before", "after", "top left", "top right"]
    words += ["bottom left", "bottom right", *map(str, range(10))]
    return texts + words * 20


def build_tokenizer() -> Tokenizer:
    """Trains the tokenizer; the same corpus always gives the same merges."""
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    text = corpus()
    for special in SPECIAL:
        text = [part for line in text for part in line.split(special) if part]
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    return tokenizer


def tokenizer_files(tokenizer: Tokenizer) -> dict[str, str]:
    """File name -> JSON text of everything about text in the checkpoint."""
    ids = {s: tokenizer.token_to_id(s) for s in SPECIAL}
    added = {
        str(i): {
            "content": s,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for s, i in ids.items()
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<image>"],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    generation = {
        "bos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "do_sample": False,
        "max_new_tokens": 16,
    }
    return {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "tokenizer_config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(generation, indent=2),
    }


class Prompts:
    """Token ids of prompts and answers; remembers what it has encoded."""

    def __init__(self, tokenizer: Tokenizer | None = None) -> None:
        self.tokenizer = tokenizer if tokenizer is not None else build_tokenizer()
        self.prefix = self.encode(PREFIX)
        self.end: int = self.encode("<|im_end|>")[0]
        self.pad: int = self.encode("<|endoftext|>")[0]
        self.encode_cached = lru_cache(maxsize=65536)(self.encode)

    @classmethod
    def of_run(cls, run: Path) -> Prompts:
        """The tokenizer a run began with: new wordings must not renumber a trained vocabulary."""
        path = run / "tokenizer.json"
        if not path.exists():
            run.mkdir(parents=True, exist_ok=True)
            path.write_text(build_tokenizer().to_str(pretty=True), encoding="utf-8")
        return cls.from_folder(run)

    @classmethod
    def from_folder(cls, folder: Path) -> Prompts:
        """Reads tokenizer.json of a checkpoint."""
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(folder / "tokenizer.json")))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens in it become their single ids."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def question(self, question: str) -> list[int]:
        """Ids between the visual rows and the answer."""
        return self.encode_cached(f"\n{question}<|im_end|>\n<|im_start|>assistant\n")

    def answer(self, answer: str) -> list[int]:
        """Ids of the answer with its end token."""
        return [*self.encode_cached(answer), self.end]
