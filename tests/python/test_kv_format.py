"""KV format names: Python and the engine read the same grammar and mean the same bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framequilt import _native
from framequilt.errors import FramequiltError, InvalidArgument
from framequilt.kv_format import BITS, GROUPS, KvFormat, parse_kv_format

PIECES = ["k", "v", "kv", "g", "+", "ends16", "rotate", "scale32", " ", "0", "x"]
NUMBERS = [str(n) for n in (*BITS, *GROUPS, 1, 5, 12, 48)]


@pytest.fixture(scope="module")
def native() -> _native.NativeModule:
    try:
        return _native.load()
    except FramequiltError as error:
        pytest.skip(str(error))


def formats() -> list[KvFormat]:
    found = []
    for k, v, group in itertools.product(BITS, BITS, (0, *GROUPS)):
        for ends16, rotate, scale32 in itertools.product((False, True), repeat=3):
            if min(k, v) > 8 and (group or ends16 or scale32):
                continue
            found.append(KvFormat(k, v, group, ends16, rotate, scale32))
    return found


def test_every_format_has_one_name_and_both_sides_read_it(native) -> None:
    names = set()
    for fmt in formats():
        assert parse_kv_format(fmt.name) == fmt
        assert native.kv_format_name(fmt.name) == fmt.name
        names.add(fmt.name)
    assert len(names) == len(formats()) > 500


@given(st.lists(st.sampled_from(PIECES + NUMBERS), max_size=9).map("".join))
def test_both_sides_refuse_the_same_names(text: str) -> None:
    try:
        native = _native.load()
    except FramequiltError as error:
        pytest.skip(str(error))

    def name(parse) -> str | None:
        try:
            return parse(text)
        except InvalidArgument:
            return None

    assert name(lambda t: parse_kv_format(t).name) == name(native.kv_format_name)


@pytest.mark.parametrize("text", ["", "kv5", "kv16g32", "kv8+rotate+rotate", "kv٨", "kv8\n"])
def test_a_wrong_name_says_what_there_is(native, text: str) -> None:
    for parse in (parse_kv_format, native.kv_format_name):
        with pytest.raises(InvalidArgument, match="kv8, kv6, kv4"):
            parse(text)


def test_bytes_are_those_of_the_engines_pages(native) -> None:
    for fmt in formats()[::7]:
        for head_dim in (64, 80, 96, 128, 256):
            for layer in (0, 1, 4):
                page = native.kv_page_bytes(fmt.name, 2, head_dim, layer, 5)
                ours = 64 * 2 * fmt.of_layer(layer, 5).bytes_per_token(head_dim)
                assert page == ours, (fmt.name, head_dim, layer)
