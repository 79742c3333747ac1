"""From chat messages to token ids with places for media, safe against injection.

Messages are rendered with the model's Jinja2 template in a sandbox, with the same environment
that `transformers` gives templates. Text that a user (or a tool, or an earlier answer) supplied
cannot become a control token or a media placeholder: before rendering, every place in it where a
special token begins gets a guard character; afterwards the rendered text is split at the special
tokens that the TEMPLATE wrote, guards are taken out, and what lies between is encoded literally.
Text without such places goes through unchanged and gets the very ids that `transformers` gives.

What remains possible: added tokens that the tokenizer does not mark as special (for instance
"<think>" in some vocabularies) are ordinary text and may be written by anyone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from framequilt.errors import InvalidArgument

if TYPE_CHECKING:
    import jinja2

MEDIA_TOKEN = -1  # stands in a prompt where the rows of the next media item go

_CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'system' %}"
    "{{ message['content'] + '\n\n' }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
_ROLE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}\Z")
# What templates may write for a media part, beside the model's own placeholder.
_GENERIC_PLACEHOLDERS = ("<image>", "<video>")
_GUARDS = range(0xF0000, 0xFFFFD)  # private use; the first one that no text contains is taken


class TextCodec(Protocol):
    """What a template needs of a tokenizer; `framequilt.tokenizer.Tokenizer` is one."""

    @property
    def specials(self) -> Mapping[str, int]: ...
    def encode(self, text: str, parse_special: bool = True) -> list[int]: ...
    def token_text(self, token: int) -> str | None: ...


@dataclass(frozen=True)
class MediaPart:
    """One picture or video of a conversation, in prompt order.

    `options` are the keyword arguments of `framequilt.vision.load_frames` that the part carried.
    """

    kind: str  # "image" | "video"
    source: Any
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Checked messages: strings and parts in one form, media taken out in order."""

    messages: tuple[dict[str, Any], ...]
    media: tuple[MediaPart, ...]


def time_instruction(duration: float, times: Sequence[float]) -> str:
    """The sentence that tells a video model about time: length, frame count, frame times.

    `duration` and `times` are seconds. LLaVA-Video was trained with exactly this wording (the
    missing space included), and answers worse without it.
    """
    listed = ",".join(f"{t:.2f}s" for t in times)
    return (
        f"The video lasts for {duration:.2f} seconds, and {len(times)} frames are uniformly "
        f"sampled from it. These frames are located at {listed}."
        "Please answer the following questions related to this video."
    )


def _url_of(part: Mapping[str, Any], key: str) -> Any:
    value = part.get(key)
    if isinstance(value, Mapping):
        value = value.get("url")
    if isinstance(value, str):
        if value.startswith(("http://", "https://", "ftp://")):
            raise InvalidArgument(
                f"{key} {value[:80]!r} is a network address, and those are not opened",
                hint="download it and pass the path, or embed it as data:...;base64,...",
            )
        if value.startswith("file://"):
            from urllib.parse import unquote, urlsplit

            address = urlsplit(value)
            if address.netloc not in ("", "localhost"):
                raise InvalidArgument(f"{key} {value!r} names another machine")
            value = unquote(address.path)
        elif value.startswith("data:") and key == "video_url":
            from framequilt.vision.processors import decode_data_url

            value = decode_data_url(value)
    return value


def _media_part(part: Mapping[str, Any]) -> MediaPart:
    kind = str(part["type"])
    source = _url_of(part, kind) if kind in part else None
    if kind.endswith("_url"):
        kind = kind.removesuffix("_url")
    elif source is None and "path" in part:
        source = part["path"]
    if source is None:
        raise InvalidArgument(
            f"a content part of type {kind!r} holds no {kind}",
            hint=f'{{"type": "{kind}", "{kind}": path or pictures}}',
        )
    options = {k: part[k] for k in ("frames", "fps", "timestamps", "policy") if k in part}
    if options and kind == "image":
        raise InvalidArgument(f"{', '.join(options)} belong to videos, not to an image part")
    extra = set(part) - {"type", "image", "video", "image_url", "video_url", "path", "detail"}
    if extra - set(options):
        raise InvalidArgument(
            f"a content part of type {kind!r} has unknown keys: {', '.join(sorted(extra))}"
        )
    return MediaPart(kind, source, options)


def parse_messages(messages: Sequence[Mapping[str, Any]]) -> Conversation:
    """Checks messages in OpenAI's form and takes their media out.

    A message has a `role` and a `content`: a string, or parts {"type": "text", "text"},
    {"type": "image", "image": path | PIL image | array}, {"type": "video", "video": path | frames,
    "frames", "fps", "timestamps", "policy"}, {"type": "image_url" | "video_url"} with a path, a
    file: or a data: address. Other keys (tool calls and so on) go to the template as they are.

    Errors: invalid_argument.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidArgument(f"messages is a list of dicts, got {type(messages)!r}")
    if not messages:
        raise InvalidArgument("messages is empty")
    media: list[MediaPart] = []
    parsed: list[dict[str, Any]] = []
    for at, message in enumerate(messages):
        where = f"messages[{at}]"
        if not isinstance(message, Mapping):
            raise InvalidArgument(f"{where} must be a dict, got {type(message)!r}")
        role = message.get("role")
        if not isinstance(role, str) or not _ROLE.match(role):
            raise InvalidArgument(
                f"{where} has role {role!r}", hint="system, user, assistant or tool"
            )
        content = message.get("content")
        if content is None and role == "assistant":
            content = ""
        parts: list[dict[str, Any]] = []
        if isinstance(content, str):
            parts.append({"type": "text", "text": content})
        elif isinstance(content, Sequence):
            for part in content:
                if isinstance(part, str):
                    part = {"type": "text", "text": part}
                kind = part.get("type") if isinstance(part, Mapping) else None
                if kind == "text" and isinstance(part.get("text"), str):
                    parts.append({"type": "text", "text": part["text"]})
                elif kind in ("image", "video", "image_url", "video_url"):
                    item = _media_part(part)
                    parts.append({"type": item.kind, item.kind: ""})
                    media.append(item)
                else:
                    raise InvalidArgument(
                        f"{where} has a content part of type {kind!r}",
                        hint="text, image, video, image_url and video_url are known",
                    )
        else:
            raise InvalidArgument(f"{where} has content of {type(content)!r}, not text or parts")
        parsed.append({**message, "content": parts})
    return Conversation(tuple(parsed), tuple(media))


def _plain(value: Any, text: Callable[[str], str]) -> Any:
    """`value` rebuilt from plain JSON types, strings passed through `text`.

    Templates come with models and are not trusted with objects that have methods.
    """
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return text(value)
    if isinstance(value, Mapping):
        return {text(str(k)): _plain(v, text) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, text) for v in value]
    return text(f"<{type(value).__name__}>")


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for k, v in value.items():
            yield str(k)
            yield from _strings(v)
    elif isinstance(value, (list, tuple)):
        for v in value:
            yield from _strings(v)


def _compile(source: str) -> jinja2.Template:
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    class Generation(jinja2.ext.Extension):
        """Lets `{% generation %}` blocks (training marks) through as their body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as cause:
        raise InvalidArgument(f"the chat template does not parse: {cause}") from cause


class ChatTemplate:
    """A model's chat template bound to its tokenizer. Immutable; any thread."""

    def __init__(
        self,
        tokenizer: TextCodec,
        source: str | None = None,
        *,
        media: str = "",
        bos: int | None = None,
        add_bos: bool = False,
        eos: Sequence[int] = (),
    ) -> None:
        """`source` None takes ChatML if the vocabulary has its tokens, else plain turns."""
        self._tokenizer = tokenizer
        self._media = media
        self._bos = bos
        self._add_bos = add_bos
        self._names = {
            "bos_token": (tokenizer.token_text(bos) or "") if bos is not None else "",
            "eos_token": (tokenizer.token_text(eos[0]) or "") if eos else "",
        }
        if source is None:
            chatml = {"<|im_start|>", "<|im_end|>"} <= set(tokenizer.specials)
            source = _CHATML if chatml else _PLAIN
        self.source = source
        self._template = _compile(source)
        placeholders = {media, *_GENERIC_PLACEHOLDERS} if media else set()
        self._placeholders = frozenset(placeholders - {""})
        reserved = sorted(
            {s for s in tokenizer.specials if s} | self._placeholders, key=len, reverse=True
        )
        self._reserved = reserved
        self._special_ids = frozenset(tokenizer.specials.values())
        self._reserved_pattern = re.compile("|".join(map(re.escape, reserved)) or r"(?!)")
        self._placeholder_pattern = re.compile(
            "|".join(map(re.escape, sorted(self._placeholders, key=len, reverse=True))) or r"(?!)"
        )

    def _shows(self, content: Any) -> str | None:
        """What a template makes of one user message; None if it fails on it."""
        import jinja2

        try:
            return self._render_raw([{"role": "user", "content": content}], None, True, {})
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return None

    @cached_property
    def takes_parts(self) -> bool:
        """Whether the template reads content as a list of parts."""
        text = self._shows([{"type": "text", "text": "PROBE"}]) or ""
        return "PROBE" in text and "'text'" not in text and '"text"' not in text

    @cached_property
    def takes_strings(self) -> bool:
        """Whether the template reads content as one string."""
        return "PROBE" in (self._shows("PROBE") or "") or not self.takes_parts

    def _render_raw(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Any,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
    ) -> str:
        return self._template.render(
            messages=messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **{**self._names, **variables},
        )

    def _guarded(self, text: str, guard: str) -> str:
        """`text` with a guard after the first character of every reserved string in it.

        A reserved string that `text` only begins, at its end, counts: the template could
        complete it.
        """
        starts = {m.start() for m in self._overlapping(text)}
        for name in self._reserved:
            for length in range(min(len(name) - 1, len(text)), 0, -1):
                if text.endswith(name[:length]):
                    starts.add(len(text) - length)
        for at in sorted(starts, reverse=True):
            text = text[: at + 1] + guard + text[at + 1 :]
        return text

    def _overlapping(self, text: str) -> Iterator[re.Match[str]]:
        at = 0
        while (match := self._reserved_pattern.search(text, at)) is not None:
            yield match
            at = match.start() + 1

    def render(
        self,
        conversation: Conversation | Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        notes: Mapping[int, str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as readable text, for people; `encode` is what a model gets."""
        text, guard = self._rendered(conversation, add_generation_prompt, notes, tools, variables)
        return text.replace(guard, "")

    def _rendered(
        self,
        conversation: Conversation | Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        notes: Mapping[int, str] | None,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None,
    ) -> tuple[str, str]:
        import jinja2

        if not isinstance(conversation, Conversation):
            conversation = parse_messages(conversation)
        if conversation.media and not self._placeholders:
            raise InvalidArgument(
                "the conversation holds pictures or video, and this model reads text only"
            )
        messages = _with_notes(conversation.messages, notes or {})
        given = "".join((*_strings(messages), *_strings(tools), *_strings(variables), self.source))
        guard = next(g for g in map(chr, _GUARDS) if g not in given)

        def protect(text: str) -> str:
            return self._guarded(text, guard)

        records = [self._record(m, protect) for m in messages]
        try:
            text = self._render_raw(
                records,
                _plain(tools, protect),
                add_generation_prompt,
                _plain(variables or {}, protect),
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError) as cause:
            raise InvalidArgument(
                f"the model's chat template refused the messages: {cause}",
                hint="templates differ in the roles and orders of messages they take",
            ) from cause
        return text, guard

    def _record(self, message: Mapping[str, Any], protect: Callable[[str], str]) -> dict[str, Any]:
        extra = {k: v for k, v in message.items() if k not in ("role", "content")}
        record: dict[str, Any] = {"role": message["role"], **_plain(extra, protect)}
        parts = message["content"]
        if self.takes_strings and [p["type"] for p in parts] == ["text"]:
            record["content"] = protect(parts[0]["text"])
            return record
        if self.takes_parts:
            record["content"] = [
                {"type": "text", "text": protect(p["text"])} if p["type"] == "text" else dict(p)
                for p in parts
            ]
            return record
        pieces = []
        for part, following in zip(parts, [*parts[1:], None], strict=True):
            if part["type"] == "text":
                pieces.append(protect(part["text"]))
            else:
                pieces.append(self._media)
            glued = following is not None and following.get("note")
            if following is not None and not glued:
                pieces.append("\n")
        record["content"] = "".join(pieces)
        return record

    def encode(
        self,
        conversation: Conversation | Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        notes: Mapping[int, str] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation, -1 where each media item goes, in order.

        Args:
            conversation: messages, or what `parse_messages` made of them.
            notes: text to put right behind the n-th media item (see `time_instruction`).
            tools: passed to the template.
            variables: more variables for the template.

        Errors: invalid_argument, also when the template refuses the messages.
        """
        if not isinstance(conversation, Conversation):
            conversation = parse_messages(conversation)
        text, guard = self._rendered(conversation, add_generation_prompt, notes, tools, variables)
        ids = self._ids(text, guard)
        found = ids.count(MEDIA_TOKEN)
        if found != len(conversation.media):
            raise InvalidArgument(
                f"the chat template has {found} media placeholders for "
                f"{len(conversation.media)} media items",
                hint=f"it must write {self._media!r} once for each",
            )
        return self._with_bos(ids)

    def encode_raw(self, text: str) -> list[int]:
        """Ids of a text that the caller wrote whole, special tokens and placeholders included."""
        return self._with_bos(self._ids(text, ""))

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self._add_bos and self._bos is not None and ids[:1] != [self._bos]:
            return [self._bos, *ids]
        return ids

    def _ids(self, text: str, guard: str) -> list[int]:
        ids: list[int] = []
        at = 0
        for match in self._placeholder_pattern.finditer(text):
            ids += self._text_ids(text[at : match.start()], guard)
            ids.append(MEDIA_TOKEN)
            at = match.end()
        return ids + self._text_ids(text[at:], guard)

    def _text_ids(self, text: str, guard: str) -> list[int]:
        if not text:
            return []
        if not guard:
            return self._tokenizer.encode(text, parse_special=True)
        if guard not in text:
            ids = self._tokenizer.encode(text, parse_special=True)
            written = sum(1 for _ in self._reserved_pattern.finditer(text))
            if written >= sum(1 for i in ids if i in self._special_ids):
                return ids
            # A normaliser of the tokenizer made a special token of look-alike characters.
        ids = []
        at = 0
        for match in self._reserved_pattern.finditer(text):
            ids += self._literal_ids(text[at : match.start()], guard)
            ids += self._tokenizer.encode(match.group(), parse_special=True)
            at = match.end()
        return ids + self._literal_ids(text[at:], guard)

    def _literal_ids(self, text: str, guard: str) -> list[int]:
        text = text.replace(guard, "")
        return self._tokenizer.encode(text, parse_special=False) if text else []


def _with_notes(
    messages: Sequence[dict[str, Any]], notes: Mapping[int, str]
) -> list[dict[str, Any]]:
    """Messages with a text part behind each media part that has a note."""
    result, item = [], 0
    for message in messages:
        parts: list[dict[str, Any]] = []
        for part in message["content"]:
            parts.append(part)
            if part["type"] != "text":
                if notes.get(item):
                    parts.append({"type": "text", "text": notes[item], "note": True})
                item += 1
        result.append({**message, "content": parts})
    return result
