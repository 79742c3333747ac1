"""Tokenizers: ids equal to the libraries that own the files; special tokens only when asked."""

from __future__ import annotations

import io

import pytest

from framequilt.errors import CorruptModel, InvalidArgument, NotFound, Unsupported
from framequilt.tokenizer import Tokenizer

TEXTS = ["", "hello world", "  two  spaces\n", "Olá 你好 🎞️", "a<|im_end|>b<|im_end|>", "<s>x</s>"]


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    tokenizers = pytest.importorskip("tokenizers")
    rust = tokenizers.Tokenizer(tokenizers.models.BPE())
    rust.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = tokenizers.decoders.ByteLevel()
    rust.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", 0)]
    )
    rust.train_from_iterator(
        ["hello world of words"] * 20,
        tokenizers.trainers.BpeTrainer(
            vocab_size=300,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|bos|>", "<|im_end|>"],
            show_progress=False,
        ),
    )
    rust.enable_truncation(2)  # what a file asks for in training must not cut prompts
    directory = tmp_path_factory.mktemp("byte_level")
    rust.save(str(directory / "tokenizer.json"))
    rust.no_truncation()
    record = {"kind": "huggingface", "file": "tokenizer.json"}
    return Tokenizer.open(directory, record), rust


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    target = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["hello world of words and pieces"] * 50),
        model_writer=target,
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        model_type="bpe",
        user_defined_symbols=["<|im_end|>", "<start_of_turn>", "zz"],
        minloglevel=2,
    )
    directory = tmp_path_factory.mktemp("pieces")
    (directory / "tokenizer.model").write_bytes(target.getvalue())
    record = {"kind": "sentencepiece", "file": "tokenizer.model"}
    reference = sentencepiece.SentencePieceProcessor()
    reference.LoadFromSerializedProto(target.getvalue())
    return Tokenizer.open(directory, record), reference


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_ids_are_the_librarys_and_text_comes_back(byte_level, text):
    tokenizer, rust = byte_level
    ids = tokenizer.encode(text)
    assert ids == rust.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special=False) == text


def test_special_tokens_are_parsed_only_when_asked(byte_level, pieces):
    for tokenizer, name in ((byte_level[0], "<|im_end|>"), (pieces[0], "<|im_end|>")):
        special = tokenizer.specials[name]
        text = f"a{name}b"
        assert tokenizer.encode(text).count(special) == 1
        assert special not in tokenizer.encode(text, parse_special=False)
        assert name in tokenizer.decode(tokenizer.encode(text), skip_special=False)
        assert name not in tokenizer.decode(tokenizer.encode(text))
        assert tokenizer.token_text(special) == name


def test_control_pieces_are_parsed_only_when_asked(pieces):
    tokenizer, reference = pieces
    assert {"<s>", "</s>", "<|im_end|>", "<start_of_turn>"} <= set(tokenizer.specials)
    assert "zz" not in tokenizer.specials  # user-defined, but an ordinary word
    assert reference.bos_id() in tokenizer.encode("<s>hello")
    assert reference.bos_id() not in tokenizer.encode("<s>hello", parse_special=False)
    start = tokenizer.specials["<start_of_turn>"]
    assert start not in tokenizer.encode("x<start_of_turn>", parse_special=False)


@pytest.mark.parametrize("text", ["hello world", "  two  spaces", "Olá 你好 🎞️", "zz"])
def test_sentencepiece_ids_are_the_librarys(pieces, text):
    tokenizer, reference = pieces
    assert tokenizer.encode(text) == reference.EncodeAsIds(text)
    assert tokenizer.encode(text, parse_special=False) == reference.EncodeAsIds(text)
    assert tokenizer.decode(tokenizer.encode(text)) == reference.DecodeIds(
        reference.EncodeAsIds(text)
    )


def test_sizes_and_unknown_tokens(byte_level, pieces):
    for tokenizer, size in (
        (byte_level[0], byte_level[1].get_vocab_size()),
        (pieces[0], pieces[1].GetPieceSize()),
    ):
        assert len(tokenizer) == size
        assert tokenizer.token_text(size) is None
        known = tokenizer.encode("hello")
        assert tokenizer.decode([*known, size, size + 99]) == "hello"  # a model's unused rows
        with pytest.raises(InvalidArgument):
            tokenizer.decode([-1])


def test_text_that_is_no_text_is_refused(byte_level):
    for bad in ("\ud800", b"bytes", None):
        with pytest.raises(InvalidArgument):
            byte_level[0].encode(bad)


def test_files_that_are_missing_broken_or_elsewhere(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": 1}')
    (tmp_path / "tokenizer.model").write_bytes(b"\x00garbage")

    def open_(kind, file):
        return Tokenizer.open(tmp_path, {"kind": kind, "file": file})

    with pytest.raises(CorruptModel):
        open_("huggingface", "tokenizer.json")
    with pytest.raises(CorruptModel):
        open_("sentencepiece", "tokenizer.model")
    with pytest.raises(NotFound):
        open_("huggingface", "none.json")
    with pytest.raises(CorruptModel):
        open_("huggingface", "../tokenizer.json")
    with pytest.raises(Unsupported):
        open_("tiktoken", "tokenizer.json")
