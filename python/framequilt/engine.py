"""The engine for Python programs: questions about text, pictures and video, answered as they come.

`Engine` owns the native engine, the tokenizer, the chat template and the preprocessor of one model
directory, and may be used from any thread. A `ResultStream` has one consumer at a time; leaving
it early cancels its request. Waiting is done in short native waits, so that Ctrl-C is answered
at once and cancels what was asked.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from framequilt import _native, errors
from framequilt.chat import (
    MEDIA_TOKEN,
    ChatTemplate,
    MediaPart,
    time_instruction,
)
from framequilt.errors import Closed, InvalidArgument
from framequilt.reduction import FrameFusion
from framequilt.request import Request, RequestOptions, conversation_of, parse_bytes
from framequilt.results import GenerationResult, StreamPiece, TokenLogprob, Usage
from framequilt.sampling import Sampling
from framequilt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from framequilt.vision import Preprocessor

_WAIT_SECONDS = 0.1


class ResultStream:
    """Pieces of an answer as they are made. An iterator and a context manager.

    Leaving the `with` block, closing or dropping the stream before its end cancels the request.
    """

    def __init__(self, native: _native.NativeStream, vocab: int) -> None:
        self._native = native
        self._vocab = vocab
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._logits: list[npt.NDArray[np.float32]] = []
        self._last: StreamPiece | None = None
        self._over = False

    @property
    def id(self) -> int:
        """The engine's number of this request."""
        return self._native.id

    @property
    def text(self) -> str:
        """The answer so far."""
        return "".join(self._text)

    def __iter__(self) -> Iterator[StreamPiece]:
        return self

    def __next__(self) -> StreamPiece:
        if self._over:
            raise StopIteration
        try:
            while (event := self._native.next(_WAIT_SECONDS)) is None:
                if self._native.done:
                    self._over = True
                    raise StopIteration
        except StopIteration:
            raise
        except BaseException:  # Ctrl-C arrives between two waits
            self.cancel()
            raise
        error = event.get("error")
        if error is not None:
            self._over = True
            raise errors.from_code(*error)
        piece = StreamPiece.of(event, self._vocab)
        self._keep(piece)
        return piece

    def _keep(self, piece: StreamPiece) -> None:
        self._text.append(piece.text)
        if piece.token is not None:
            self._tokens.append(piece.token)
            if piece.logprob is not None:
                self._logprobs.append(piece.logprob)
            if piece.logits is not None:
                self._logits.append(piece.logits)
        if piece.finish_reason:
            self._last, self._over = piece, True

    def cancel(self) -> None:
        """Asks the engine to stop at the next layer; the last piece then says "cancelled"."""
        self._native.cancel()

    def close(self) -> None:
        """Cancels the request if it is not finished, and ends the iteration."""
        if not self._over:
            self._over = True
            self._native.cancel()

    def result(self) -> GenerationResult:
        """Waits for the end and returns the whole answer. Errors: those of the request."""
        for _ in self:
            pass
        last = self._last
        if last is None:
            raise errors.Cancelled("the stream was closed before the answer was finished")
        return GenerationResult(
            text=self.text,
            token_ids=tuple(self._tokens),
            finish_reason=last.finish_reason,
            usage=last.usage or Usage(),
            logprobs=tuple(self._logprobs) if self._logprobs else None,
            logits=np.stack(self._logits) if self._logits else None,
            prompt_logits=last.prompt_logits,
        )

    def __enter__(self) -> ResultStream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            self.close()


class Engine:
    """A model that is ready to answer. Use as a context manager, or call `close`.

    Args:
        model: a model directory made by `framequilt convert`.
        kv: format of the KV cache, such as "kv16", "kv8", "k8v4" or "kv4g32+ends16"
            (`framequilt.kv_format`); None is the model's default.
        activations: the inputs of linears: "a16" (float32), "abf16" (rounded to bfloat16: faster
            where the processor multiplies such numbers), or quantized per token: "a8", "a6" or
            "a4", "-asym" behind them for an asymmetric range; None is what the model says. As in a
            conversion it holds for every linear with quantized weights ("abf16": or bf16 ones) but
            the head, which has to be named: "a8,head=a8". So does the vision tower's attention,
            whose queries and keys can have 8 bits: "a8,attention=a8" (engine/CONTRACT.md, 1.5).
        numerics: how quantized or rounded inputs are multiplied: "int" (integer or bfloat16
            products), or "exact" (float32 products of the numbers that they stand for; slow, to
            compare with).
        memory: bytes for KV pages and workspace, as 2**30, "1GiB" or "512MB". Weights are mapped
            and not counted.
        threads: compute threads; 0 is one per physical core.
        max_sequences: requests that run at once; more wait in order.
        chunk_rows: rows of one prefill step.
        max_context: longest sequence; 0 is the model's limit.
        simd: instruction set, "" for the best one here (see `framequilt doctor`).
        verify: read every byte of the model and compare its SHA-256 first.
        page_shuffle_seed, manual_step: for tests; with `manual_step` the caller drives `step`.

    Errors: not_found, corrupt_model, version_mismatch, unsupported, invalid_argument,
    out_of_memory.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        kv: str | None = None,
        activations: str | None = None,
        numerics: str = "int",
        memory: int | str = "1GiB",
        threads: int = 0,
        max_sequences: int = 64,
        chunk_rows: int = 512,
        max_context: int = 0,
        simd: str = "",
        verify: bool = False,
        page_shuffle_seed: int = 0,
        manual_step: bool = False,
    ) -> None:
        memory_bytes = parse_bytes(memory)
        native = _native.load()
        self._directory = Path(model)
        self._lock = threading.Lock()
        self._engine: _native.NativeEngine | None = None
        opened = native.Model.open(str(self._directory), verify_checksums=verify)
        self._config: dict[str, Any] = json.loads(  # the native engine has checked it
            (self._directory / "config.json").read_text(encoding="utf-8")
        )
        self._vocab = int(self._config["decoder"]["vocab"])
        tokens = self._config["tokens"]
        self._tokenizer = Tokenizer.open(self._directory, tokens["tokenizer"])
        template = self._directory / "chat_template.jinja"
        self._chat = ChatTemplate(
            self._tokenizer,
            template.read_text(encoding="utf-8") if template.is_file() else None,
            media=tokens.get("media") or "",
            bos=tokens.get("bos"),
            add_bos=bool(tokens.get("add_bos")),
            eos=tokens.get("eos") or (),
        )
        self._preprocessor = self._open_preprocessor()
        self._engine = native.Engine(
            opened,
            kv=kv or "",
            activations=activations or "",
            numerics=numerics,
            memory_bytes=memory_bytes,
            threads=threads,
            chunk_rows=chunk_rows,
            max_sequences=max_sequences,
            max_context=max_context,
            simd=simd,
            page_shuffle_seed=page_shuffle_seed,
            manual_step=manual_step,
        )

    def _open_preprocessor(self) -> Preprocessor | None:
        vision = self._config.get("vision")
        if vision is None:
            return None
        from framequilt.vision import Preprocessor

        return Preprocessor.open(self._directory, int(vision["patch"]))

    # --- What it is -------------------------------------------------------------------------

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's `config.json`, parsed."""
        return self._config

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self._tokenizer

    @property
    def chat(self) -> ChatTemplate:
        """The model's chat template."""
        return self._chat

    @property
    def preprocessor(self) -> Preprocessor | None:
        """What prepares pictures; None for models that read text only."""
        return self._preprocessor

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._engine is None

    def _running(self) -> _native.NativeEngine:
        engine = self._engine
        if engine is None:
            raise Closed("the engine was closed", hint="make a new Engine")
        return engine

    def plan(self) -> Mapping[str, int]:
        """Where memory goes: weight, workspace, KV and page bytes, pages, tokens that fit."""
        return self._running().plan()

    def stats(self) -> Mapping[str, int]:
        """Requests running and waiting, pages in all and free, steps done."""
        return self._running().stats()

    def check_integrity(self) -> None:
        """Walks pool, tables and sequences. Errors: internal, which names what is broken."""
        self._running().check_integrity()

    def describe_kernels(self) -> str:
        """The kernel chosen for each kind of block, one line each."""
        return self._running().describe_kernels()

    def step(self) -> bool:
        """One unit of work of an engine made with `manual_step`; says whether work remains."""
        return self._running().step()

    # --- Asking ------------------------------------------------------------------------------

    def stream(
        self,
        prompt: str | Sequence[Mapping[str, Any]] | Sequence[int],
        **options: Unpack[RequestOptions],
    ) -> ResultStream:
        """Starts an answer and returns its pieces as they come; options as in `Request`.

        Media are decoded and prepared before this returns. Errors of the request itself
        (context_overflow, out_of_pages, ...) are raised by the iteration.
        """
        return self.submit(Request(prompt, **options))

    def generate(
        self,
        prompt: str | Sequence[Mapping[str, Any]] | Sequence[int],
        **options: Unpack[RequestOptions],
    ) -> GenerationResult:
        """Answers and waits for the end; options as in `Request`. Ctrl-C cancels."""
        with self.stream(prompt, **options) as stream:
            return stream.result()

    def generate_batch(
        self, requests: Sequence[Request | Mapping[str, Any] | str]
    ) -> list[GenerationResult]:
        """Answers several requests that run together, in the order given.

        A request is a question, a `Request` or a dict of its fields. The first error cancels
        the rest and is raised.
        """
        whole = [
            r if isinstance(r, Request) else Request(r) if isinstance(r, str) else Request(**r)
            for r in requests
        ]
        with contextlib.ExitStack() as running:
            streams = [running.enter_context(self.submit(r)) for r in whole]
            return [stream.result() for stream in streams]

    def submit(self, request: Request) -> ResultStream:
        """Prepares a request, hands it to the engine and returns its stream."""
        engine = self._running()
        return ResultStream(engine.submit(self.prepare(request)), self._vocab)

    def prompt_logits(self, prompt: str | Sequence[int]) -> npt.NDArray[np.float32]:
        """Logits of every row of a raw prompt, float32 [tokens, vocab]; row i predicts i + 1."""
        sampling = Sampling(max_tokens=1, temperature=0.0)
        result = self.generate(prompt, raw=True, sampling=sampling, return_prompt_logits=True)
        if result.prompt_logits is None:
            raise errors.InternalError("the engine returned no prompt logits")
        return result.prompt_logits

    def score(self, prompt: str | Sequence[int]) -> npt.NDArray[np.float64]:
        """Natural log-probability of each token of a raw prompt but the first, [tokens - 1]."""
        ids = self._chat.encode_raw(prompt) if isinstance(prompt, str) else list(prompt)
        if len(ids) < 2:
            raise InvalidArgument(f"a prompt of {len(ids)} tokens has nothing to score")
        logits = self.prompt_logits(ids)[:-1].astype(np.float64)
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(len(ids) - 1), ids[1:]]
        scores: npt.NDArray[np.float64] = chosen - np.log(np.exp(logits).sum(axis=-1))
        return scores

    # --- From a request to what the native engine takes ------------------------------------------

    def prepare(self, request: Request) -> dict[str, Any]:
        """The dictionary that the native engine takes: token ids and float32 media tensors."""
        sampling = request.sampling_parameters()
        reduction = FrameFusion.of(request.reduction)
        if reduction is not None and request.return_prompt_logits:
            raise InvalidArgument(
                "prompt logits cannot be had together with a reduction",
                hint="the rows that it drops have none",
            )
        parts: Sequence[MediaPart] = request.media_parts()
        complete = request.raw or (
            not isinstance(request.prompt, str)
            and len(request.prompt) > 0
            and all(isinstance(t, (int, np.integer)) for t in request.prompt)
        )
        if complete:
            media, _ = self._prepare_media(parts, request)
            ids = self._complete_ids(request)
        else:
            conversation = conversation_of(request, parts)
            media, notes = self._prepare_media(conversation.media, request)
            ids = self._chat.encode(
                conversation,
                notes=notes,
                tools=request.tools,
                variables=request.template_variables,
            )
        if ids.count(MEDIA_TOKEN) != len(media):
            raise InvalidArgument(
                f"the prompt has places for {ids.count(MEDIA_TOKEN)} media items, "
                f"{len(media)} were given"
            )
        default = (self._config.get("defaults") or {}).get("similarity_lower_bound")
        return {
            "prompt": ids,
            "media": media,
            "sampling": sampling.to_native(),
            "reduction": None if reduction is None else reduction.to_native(default),
            "return_logits": request.return_logits,
            "return_prompt_logits": request.return_prompt_logits,
        }

    def _complete_ids(self, request: Request) -> list[int]:
        if isinstance(request.prompt, str):
            return self._chat.encode_raw(request.prompt)
        ids = [int(t) for t in request.prompt]  # type: ignore[arg-type]
        for token in ids:
            if not MEDIA_TOKEN <= token < 2**31:
                raise InvalidArgument(f"{token} is no token id", hint="-1 stands for media")
        return ids

    def _prepare_media(
        self, parts: Sequence[MediaPart], request: Request
    ) -> tuple[list[dict[str, Any]], dict[int, str]]:
        """Tensors of the media, and the sentence about time behind each video."""
        if parts and self._preprocessor is None:
            raise InvalidArgument(
                f"the model {self._config.get('name', '')!r} reads text only",
                hint="leave out the pictures and the video",
            )
        media: list[dict[str, Any]] = []
        notes: dict[int, str] = {}
        pictures = sum(part.kind == "image" for part in parts)
        for at, part in enumerate(parts):
            assert self._preprocessor is not None
            if part.kind == "image":
                image = self._preprocessor.image(part.source, tiled=pictures == 1)
                media.append(
                    {"kind": "image", "data": image.data, "tiles": image.tiles, "slots": None}
                )
                continue
            clip = self._preprocessor.video(part.source, progress=request.progress, **part.options)
            media.append({"kind": "video", "data": clip.images, "tiles": None, "slots": None})
            wanted = request.time_instruction
            if self._preprocessor.time_instruction if wanted is None else wanted:
                notes[at] = time_instruction(clip.duration, clip.times)
        return media, notes

    # --- The end ------------------------------------------------------------------------------

    def close(self) -> None:
        """Cancels what runs and frees everything. Later calls raise `Closed`; closing again is
        harmless."""
        with self._lock:
            engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
