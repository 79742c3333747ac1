"""The grammar of schemes: which slot gets which format, and what is refused."""

from __future__ import annotations

import pytest

from framequilt.errors import InvalidArgument
from framequilt.quantize import parse_activation_scheme, parse_scheme
from framequilt.quantize.schemes import check_patterns, number_layers, summary

SLOTS = [
    "vision.patch_embedding",
    *(f"vision.layers.{n}.{part}" for n in range(3) for part in ("attention.q", "mlp.up")),
    "projector.layers.0",
    "projector.layers.1",
    "decoder.embedding",
    *(f"decoder.layers.{n}.{part}" for n in range(12) for part in ("attention.q", "mlp.down")),
    "decoder.head",
]


def formats(text: str, tied: bool = False) -> dict[str, str]:
    scheme = parse_scheme(text)
    return {slot: scheme.format_of(slot, tied=tied).name for slot in SLOTS}


def activations(text: str, tied: bool = False) -> dict[str, str]:
    scheme = parse_activation_scheme(text)
    found = {slot: scheme.format_of(slot, tied=tied) for slot in SLOTS}
    return {slot: form.name for slot, form in found.items() if form is not None}


def test_one_name_leaves_tables_and_tower_at_eight_bits() -> None:
    for slot, name in formats("w3g64-sym").items():
        assert name == ("w3g64-sym" if slot.startswith("decoder.layers.") else "w8g64-sym")
    assert set(formats("bf16").values()) == {"bf16"}


def test_patterns_name_slots_with_or_without_short_names() -> None:
    found = formats("w4g128,lm_head=bf16,embedding=w6,layers.1.*=w8row,vision.*=w5,projector=w2")
    assert found["decoder.head"] == "bf16" and found["decoder.embedding"] == "w6g128"
    assert found["decoder.layers.1.mlp.down"] == "w8row"
    assert found["decoder.layers.10.mlp.down"] == found["decoder.layers.0.mlp.down"] == "w4g128"
    assert found["vision.layers.1.mlp.up"] == found["vision.patch_embedding"] == "w5g128"
    assert found["projector.layers.0"] == "w2g128"
    same = formats("w4,decoder.head=bf16,decoder.embedding=w6,decoder.layers.1=w8row,vision=w5,"
                   "projector.layers.*=w2")  # fmt: skip
    assert same == found
    assert formats("w4,head=w2") == formats("w4,lm_head=w2")


def test_a_pattern_of_tower_layers_does_not_touch_the_decoder() -> None:
    found = formats("w4,vision.layers.0.*=w2")
    assert [slot for slot, name in found.items() if name == "w2g128"] == [
        "vision.layers.0.attention.q", "vision.layers.0.mlp.up",
    ]  # fmt: skip


def test_the_last_pattern_that_matches_wins() -> None:
    found = formats("w4,layers.*=w8,*.attention.q=bf16,layers.2.*=w3")
    assert found["decoder.layers.0.attention.q"] == "bf16"
    assert found["decoder.layers.0.mlp.down"] == "w8g128"
    assert found["decoder.layers.2.attention.q"] == "w3g128"
    scheme = parse_scheme("w4,layers.*=w8", {"layers.*": "w3"})
    assert scheme.format_of("decoder.layers.0.mlp.up").name == "w3g128"


def test_the_head_of_a_tied_model_is_its_embedding() -> None:
    assert formats("w4,lm_head=bf16", tied=True)["decoder.embedding"] == "bf16"
    assert formats("w4,lm_head=bf16", tied=False)["decoder.embedding"] == "w8g128"


def test_kept_codes_give_way_to_patterns() -> None:
    scheme = parse_scheme("keep,layers.0.*=w8")
    assert not scheme.keeps("decoder.layers.0.mlp.up") and scheme.keeps("decoder.layers.1.mlp.up")
    assert scheme.format_of("decoder.layers.1.mlp.up").name == "w8g128"
    assert scheme.name == "keep,layers.0.*=w8g128"
    assert not parse_scheme("w4").keeps("decoder.layers.0.mlp.up")


def test_patterns_alone_change_the_default() -> None:
    assert parse_scheme("lm_head=w6").name == "w4g128,lm_head=w6g128"


def test_names_of_schemes_read_back() -> None:
    for text in ("w4g128", "w4g128,lm_head=w8g128,layers.0.*=w3g32-offset", "keep,vision.*=bf16"):
        assert parse_scheme(text).name == text
        assert parse_scheme(parse_scheme(text).name) == parse_scheme(text)
    for text in ("a16", "a8,layers.0.*=a16,head=a8-asym"):
        assert parse_activation_scheme(text).name == text


@pytest.mark.parametrize("text", ["", "w4,", ",w4", "w4,w8", "w4,x=", "w4,=w8", "w4,x=w7", "kept"])
def test_what_is_no_scheme_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument):
        parse_scheme(text)


def test_a_pattern_without_a_slot_lists_the_slots() -> None:
    scheme = parse_scheme("w4,layers.12.*=w8")
    with pytest.raises(
        InvalidArgument, match=r"'layers\.12\.\*'.*decoder\.layers\.0-11\.mlp\.down"
    ):
        check_patterns(scheme.overrides, SLOTS)
    check_patterns(parse_scheme("w4,layers.11.*=w8").overrides, SLOTS)
    tied = [slot for slot in SLOTS if slot != "decoder.head"]
    check_patterns(parse_scheme("w4,lm_head=w8").overrides, tied, tied=True)
    with pytest.raises(InvalidArgument, match="lm_head"):
        check_patterns(parse_scheme("w4,lm_head=w8").overrides, tied, tied=False)


def test_layers_count_from_the_end_too() -> None:
    scheme = parse_scheme("w4,layers.-1.*=w8,vision.layers.-3=w2,layers.-13.*=w2")
    counted = number_layers(scheme.overrides, {"decoder": 12, "vision": 3})
    assert [entry.pattern for entry in counted] == [
        "decoder.layers.11.*", "vision.layers.0", "layers.-13.*",
    ]  # fmt: skip
    with pytest.raises(InvalidArgument, match=r"layers\.-13"):
        check_patterns(counted, SLOTS)


def test_slots_are_drawn_together_for_messages() -> None:
    assert summary(SLOTS)[:2] == ["vision.patch_embedding", "vision.layers.0-2.attention.q"]
    assert len(summary(SLOTS)) == 9
    assert summary(["decoder.layers.5.mlp.up"]) == ["decoder.layers.5.mlp.up"]


def test_activations_are_for_all_linears_but_the_head_unless_asked_for() -> None:
    assert activations("a16") == {}
    found = activations("a8,layers.3.*=a16,layers.4.mlp.*=a4-asym")
    left = {"decoder.head", "decoder.embedding", *(s for s in SLOTS if ".layers.3." in s)}
    assert set(found) == set(SLOTS) - left
    assert found["decoder.layers.4.mlp.down"] == "a4-asym"
    assert found["decoder.layers.4.attention.q"] == found["vision.patch_embedding"] == "a8"
    assert set(activations("a16,vision.*=a8,lm_head=a8")) == {
        slot for slot in SLOTS if slot.startswith("vision.") or slot == "decoder.head"
    }


def test_inputs_are_rounded_by_the_same_rule() -> None:
    found = activations("abf16,layers.4.*=a8")
    assert set(found) == set(SLOTS) - {"decoder.head", "decoder.embedding"}
    assert found["decoder.layers.4.mlp.down"] == "a8" and found["vision.patch_embedding"] == "abf16"
    assert activations("a8,head=abf16")["decoder.head"] == "abf16"


def test_the_embedding_lookup_is_never_quantized() -> None:
    """As a head of its own right it has to be named: `*` is not enough."""
    assert "decoder.embedding" not in activations("a8,*=a8")
    assert "decoder.embedding" not in activations("a8,embedding=a8")
    assert "decoder.embedding" not in activations("a8,*=a8", tied=True)
    assert activations("a8,lm_head=a8", tied=True)["decoder.embedding"] == "a8"
