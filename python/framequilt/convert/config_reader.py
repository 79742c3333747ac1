"""Typed reading of a checkpoint's config.json, which refuses what it does not understand.

A family reads the keys it knows. `finish` then refuses every key that nobody read, unless the key
is on the short list of those that cannot change a result: an option that is silently skipped would
give wrong answers without a sign.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from framequilt.errors import CorruptModel, Unsupported

T = TypeVar("T")


class _Missing:
    """Marks a key without a default."""


MISSING = _Missing()

_BOOKKEEPING = "says where the checkpoint comes from"
_GENERATION = "a generation default; requests carry their own"
_TRAINING = "matters in training only"
_OUTPUT = "chooses what a Python call returns"
_TOKENS = "token ids are read from the tokenizer and the generation config"
_HEAD = "belongs to classification heads, which are not converted"

# Key -> why it cannot change the numbers of a converted model.
HARMLESS: dict[str, str] = {
    **dict.fromkeys(
        (
            "_commit_hash", "_name_or_path", "architectures", "auto_map", "finetuning_task",
            "model_type", "name_or_path", "prefix", "processor_class", "task_specific_params",
            "tokenizer_class", "transformers_version", "unsloth_fixed", "unsloth_version",
        ),
        _BOOKKEEPING,
    ),
    **dict.fromkeys(
        (
            "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "dtype",
            "tf_legacy_loss", "torch_dtype", "torchscript", "use_bfloat16", "use_cache",
        ),
        "how another program computes",
    ),
    **dict.fromkeys(
        (
            "attention_dropout", "attn_pdrop", "embd_pdrop", "gradient_checkpointing",
            "hidden_dropout", "initializer_factor", "initializer_range", "pretraining_tp",
            "problem_type", "pruned_heads", "resid_pdrop",
        ),
        _TRAINING,
    ),
    **dict.fromkeys(
        (
            "bad_words_ids", "begin_suppress_tokens", "diversity_penalty", "do_sample",
            "early_stopping", "encoder_no_repeat_ngram_size", "exponential_decay_length_penalty",
            "forced_bos_token_id", "forced_eos_token_id", "length_penalty", "max_length",
            "min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams",
            "num_return_sequences", "remove_invalid_values", "repetition_penalty",
            "suppress_tokens", "temperature", "top_k", "top_p", "typical_p",
        ),
        _GENERATION,
    ),
    **dict.fromkeys(
        (
            "chunk_size_feed_forward", "output_attentions", "output_hidden_states",
            "output_scores", "return_dict", "return_dict_in_generate",
        ),
        _OUTPUT,
    ),
    **dict.fromkeys(
        ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "sep_token_id"),
        _TOKENS,
    ),
    **dict.fromkeys(("id2label", "label2id", "num_labels"), _HEAD),
}  # fmt: skip


class ConfigReader:
    """One JSON object of a config; every getter marks its key as understood."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = dict(values)
        self.where = where
        self._known: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def raw(self, key: str) -> Any:
        """The value as it is, None where it is missing."""
        self._known.add(key)
        return self.values.get(key)

    def _get(self, key: str, kind: type[T] | tuple[type[T], ...], what: str, default: Any) -> Any:
        value = self.raw(key)
        if value is None:
            if isinstance(default, _Missing):
                raise CorruptModel(f"{self.where}: {key} is missing")
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise CorruptModel(f"{self.where}: {key} is {value!r}, not {what}")
        return value

    def integer(self, key: str, default: Any = MISSING, *, minimum: int = 1) -> Any:
        """A whole number of at least `minimum`; null counts as missing."""
        value = self._get(key, int, "a whole number", default)
        if value is not None and value < minimum:
            raise CorruptModel(f"{self.where}: {key} is {value}, less than {minimum}")
        return value

    def number(self, key: str, default: Any = MISSING) -> Any:
        """A finite number above 0; null counts as missing."""
        value = self._get(key, (int, float), "a number", default)
        if value is None:
            return None
        if not (math.isfinite(value) and value > 0):
            raise CorruptModel(f"{self.where}: {key} is {value!r}, not a finite number above 0")
        return float(value)

    def flag(self, key: str, default: Any = MISSING) -> Any:
        """True or false; null counts as missing."""
        return self._get(key, bool, "true or false", default)

    def text(self, key: str, default: Any = MISSING) -> Any:
        """A text; null counts as missing."""
        return self._get(key, str, "a text", default)

    def choice(self, key: str, meaning: Mapping[str, T], default: Any = MISSING) -> T:
        """Translates a text by a table. Errors: Unsupported, which lists the table."""
        value = self.text(key, default)
        if value not in meaning:
            raise Unsupported(
                f"{self.where}: {key} is {value!r}", f"known: {', '.join(sorted(meaning))}"
            )
        return meaning[value]

    def sub(self, key: str) -> ConfigReader:
        """The object below a key. Errors: CorruptModel when it is none."""
        value = self._get(key, dict, "an object", MISSING)
        return ConfigReader(value, f"{self.where}: {key}")

    def require(self, key: str, *allowed: Any, reason: str) -> None:
        """Refuses any value but `allowed`; a missing key or null is fine. Errors: Unsupported."""
        value = self.raw(key)
        if value is not None and value not in allowed:
            raise Unsupported(f"{self.where}: {key} is {value!r}", reason)

    def ignore(self, *keys: str) -> None:
        """Declares keys harmless here; the family says why in a comment beside the call."""
        self._known.update(keys)

    def finish(self) -> None:
        """Refuses what nobody read. null is as good as absent. Errors: Unsupported."""
        unknown = [
            f"{key} = {value!r}"[:80]
            for key, value in sorted(self.values.items())
            if key not in self._known and key not in HARMLESS and value is not None
        ]
        if unknown:
            raise Unsupported(
                f"{self.where} has keys with an unknown meaning: {', '.join(unknown)}",
                "they may change the model's results; a family file has to handle them first",
            )
