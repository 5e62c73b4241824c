"""Texts, files and data sets to batches of tokens.

Where tokens come from
    ======================  =========================================================================================
    ``.txt``, ``.md``       one text, in UTF-8; a long one is tokenized in pieces of at most 262,144 characters, cut
                            at ends of lines
    ``.jsonl``, ``.ndjson`` an object a line with ``text``, or with ``messages``, which go through the tokenizer's
                            chat template; other keys are not looked at, blank lines are passed over
    ``.parquet``,           columns ``text`` or ``messages`` of a data set; needs the package pyarrow
    ``.arrow``
    a folder                a data set of the package datasets: what ``save_to_disk`` wrote, or files of one of the
                            kinds above; of several splits, train
    ``.safetensors``        ``input_ids``, integers [windows, L] or [tokens]; perhaps an ``attention_mask`` so
    ``.npy``                the same integers as an array
    batches                 tensors of token ids [B, L] or [L], or mappings of a model's arguments
    nothing                 a text that ships with the package, mixed prose, dialogue and code; the result says so
    ======================  =========================================================================================

    No pickle is loaded. Sources are read from their start and only as far as needed; of several, a window of each in
    turn.

Windows
    A window is at most ``sequence_length`` tokens long, with the special tokens that the tokenizer puts around a text.
    "pack" joins texts in their order, the tokenizer's end-of-text token after each that is no chat, and cuts what
    comes: every window but a source's last is full, and there is no padding. "pad" keeps texts apart: a long one is cut
    into full windows, what is left of it and a short text are windows of their own. "auto" pads where the tokenizer has
    a mask token, as those of encoders have, otherwise packs. Rows of a tensor file are cut where they are longer, and
    never joined.

    Windows of unequal length that share a batch are padded on the right; padding has 0 in ``attention_mask`` and counts
    in no number here.

How many tokens
    The counts are the least: the last window is kept whole. Where there are fewer, the result has what there is, a note
    says so and is logged as a warning; none at all is an error. Calibration and held-out tokens come from different
    windows of the same sources, in turn, in proportion to their counts.
"""

import itertools
import logging
import os
import reprlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from miniquant.sources import (
    LINE_SUFFIXES,
    PICKLES,
    PREFIX,
    SUFFIXES,
    TENSOR_SUFFIXES,
    TEXT_SUFFIXES,
    data_files,
    lines,
    npy_rows,
    pieces,
    safetensors_rows,
    table_rows,
)

Short = Literal["auto", "pack", "pad"]
Batch = dict[str, Any]
Source = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[Tensor | Mapping[str, Any]]

DEFAULT_TEXT = Path(__file__).parent / "data" / "calibration.txt"
_BATCH_TOKENS = 2048
_NO_BOUND = 2**63 - 1
_DEFAULT_NAME = "the text that ships with miniquant"
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32)

logger = logging.getLogger(__name__)


class Tokenizer(Protocol):
    """What is asked of a tokenizer; those of transformers have it.

    Looked at where they are there, too: ``model_max_length``, ``mask_token``, ``eos_token_id``, ``pad_token_id``, and
    for messages ``chat_template`` and ``apply_chat_template``.
    """

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool) -> Mapping[str, Any]:
        """A mapping with the list ``input_ids``; ``verbose=False`` of a text longer than a model takes."""


@dataclass(frozen=True)
class SourceTokens:
    """What one source gave.

    Attributes:
        name: of the file or folder.
        windows: that were taken from it.
        tokens: that count, in these.
        held_out: how many of the tokens are held out.
    """

    name: str
    windows: int
    tokens: int
    held_out: int


@dataclass(frozen=True, eq=False)
class Calibration:
    """Batches of tokens, and where they come from.

    Attributes:
        batches: arguments of a model's forward: ``input_ids`` and ``attention_mask``, int64 [B, L] on the CPU.
        held_out: the same from other windows.
        tokens: that count in ``batches``: padding does not.
        held_out_tokens: that count in ``held_out``.
        sources: what each gave.
        ships_with_package: whether the text is the one that ships with the package.
        notes: what a report should say: fewer tokens than were asked for, and the like.
    """

    batches: tuple[Batch, ...]
    held_out: tuple[Batch, ...]
    tokens: int
    held_out_tokens: int
    sources: tuple[SourceTokens, ...]
    ships_with_package: bool
    notes: tuple[str, ...]


def load_calibration(
    source: Source | None = None,
    tokenizer: Tokenizer | None = None,
    *,
    tokens: int = 32768,
    sequence_length: int = 2048,
    held_out_tokens: int = 0,
    short: Short = "auto",
    batch_tokens: int | None = None,
    vocabulary: int | None = None,
) -> Calibration:
    """Reads tokens and puts them into batches; the module says how. The same arguments give the same batches.

    Args:
        source: a path, several of them, batches, or None for the text that ships with the package. Batches stay as they
            are, but for an ``attention_mask`` of ones where ``input_ids`` have none; they are read until they have the
            tokens that are asked for. A batch without either counts its ``decoder_input_ids``, or else no token.
        tokenizer: of the model; not needed for tensor files and batches.
        tokens: for calibration.
        sequence_length: of a window, at most; also at most the tokenizer's ``model_max_length``, which a note says.
        held_out_tokens: that are kept apart, to measure with.
        short: what happens to texts shorter than a window.
        batch_tokens: of a batch, padding included, at most (a longer window is a batch of its own); None: 2048, or the
            sequence length.
        vocabulary: token ids must be smaller; None: the tokenizer's length, or no such bound without a tokenizer.

    Raises:
        OSError: where a file cannot be read.
        ValueError, TypeError: for a bad argument or a bad source; the message names the file and the line or row.
        ImportError: where a package that reads a source is missing.

    Example:
        >>> calibration = load_calibration("notes.txt", tokenizer, tokens=8192, sequence_length=512)
        >>> for batch in calibration.batches:
        ...     model(**batch)
    """
    counts: dict[str, Any] = {
        "tokens": (tokens, 1),
        "sequence_length": (sequence_length, 1),
        "batch_tokens": (1 if batch_tokens is None else batch_tokens, 1),
        "held_out_tokens": (held_out_tokens, 0),
        "vocabulary": (1 if vocabulary is None else vocabulary, 1),
    }
    for name, (value, least) in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{PREFIX}: expected {name} to be an integer of at least {least}, but got {value!r}")
    if short not in get_args(Short):
        raise ValueError(f"{PREFIX}: expected short to be one of {', '.join(get_args(Short))}, but got {short!r}")
    if vocabulary is None:
        vocabulary = _NO_BOUND if tokenizer is None else getattr(tokenizer, "__len__", lambda: _NO_BOUND)()
    parts = _Parts(tokens, held_out_tokens)
    if source is not None and not _is_paths(source):
        batches: Any = [source] if isinstance(source, Tensor | Mapping) else source
        if not isinstance(batches, Iterable):
            raise TypeError(f"{PREFIX}: expected source to be paths, batches or None, but got {type(source).__name__}")
        given = _Source(
            "batches",
            (given_batch(batch, f"{PREFIX}: batch {number}", vocabulary) for number, batch in enumerate(batches, 1)),
        )
        parts.fill([given])
        return parts.result([given], lambda taken: [batch.arguments for batch in taken])

    notes: list[str] = []
    longest = getattr(tokenizer, "model_max_length", sequence_length)
    if longest < sequence_length:
        notes.append(f"windows have {longest} tokens, the tokenizer's model_max_length, instead of {sequence_length}")
        sequence_length = longest
    reader = _Reader(tokenizer, sequence_length, short, vocabulary)
    sources = [_Source(name, reader.windows(path, name)) for name, path in _paths(source).items()]
    parts.fill(sources)
    notes += [f"{name}: texts without a token: {count}" for name, count in reader.empty.items() if count]
    limit = max(_BATCH_TOKENS, sequence_length) if batch_tokens is None else batch_tokens
    pad = next((t for name in ("pad", "eos") if (t := getattr(tokenizer, f"{name}_token_id", None)) is not None), 0)
    return parts.result(
        sources, lambda taken: _batched(taken, limit, pad), notes=notes, ships_with_package=source is None
    )


def _paths(source: Any) -> dict[str, Path]:
    """Names and paths of the files and folders of a source."""
    if source is None:
        return {_DEFAULT_NAME: DEFAULT_TEXT}
    paths = {str(path): path for path in map(Path, [source] if isinstance(source, str | os.PathLike) else source)}
    if not paths:
        raise ValueError(f"{PREFIX}: expected at least one path or batch, but got none")
    return paths


def needs_tokenizer(source: Source | None) -> bool:
    """Whether :func:`load_calibration` reads texts of a source: all but batches and files of tensors."""
    if source is None:
        return True
    return _is_paths(source) and any(path.suffix.lower() not in TENSOR_SUFFIXES for path in _paths(source).values())


def _is_paths(source: object) -> bool:
    """Whether a source is a path or several."""
    if isinstance(source, str | os.PathLike):
        return True
    return isinstance(source, list | tuple) and all(isinstance(path, str | os.PathLike) for path in source)


@dataclass(frozen=True, eq=False)
class _Window:
    """Token ids and mask, int64 [L] each."""

    ids: Tensor
    mask: Tensor

    @property
    def tokens(self) -> int:
        return int(self.mask.sum())


@dataclass(frozen=True, eq=False)
class GivenBatch:
    """Arguments of a model, and how many of their tokens count."""

    arguments: Batch
    tokens: int


@dataclass(eq=False)
class _Source:
    """A source, and the tokens of each part that came from it so far."""

    name: str
    windows: Iterator[Any]
    taken: int = 0
    tokens: list[int] = field(default_factory=lambda: [0, 0])


class _Parts:
    """Calibration and held-out windows."""

    def __init__(self, *wanted: int) -> None:
        self.wanted = wanted
        self.windows: tuple[list[Any], list[Any]] = ([], [])
        self.tokens = [0, 0]

    def fill(self, sources: Iterable[_Source]) -> None:
        """Takes a window of each source in turn, until either part has the tokens that it should have."""
        left = deque(sources)
        while left and not all(map(self._is_full, (0, 1))):
            source = left.popleft()
            window = next(source.windows, None)
            if window is None:
                continue
            part = self._part_of(source)
            self.windows[part].append(window)
            self.tokens[part] += window.tokens
            source.tokens[part] += window.tokens
            source.taken += 1
            left.append(source)

    def _is_full(self, part: int) -> bool:
        return self.tokens[part] >= self.wanted[part]

    def _part_of(self, source: _Source) -> int:
        """The part that has less of this source than it should, of those that are not full."""
        if self._is_full(0) or self._is_full(1):
            return int(self._is_full(0))
        return int(source.tokens[0] * self.wanted[1] > source.tokens[1] * self.wanted[0])

    def result(
        self,
        sources: Sequence[_Source],
        join: Callable[[list[Any]], list[Batch]],
        notes: Sequence[str] = (),
        *,
        ships_with_package: bool = False,
    ) -> Calibration:
        """The parts as batches."""
        names = ", ".join(source.name for source in sources)
        said = list(notes)
        for what, wanted, windows, tokens in zip(
            ("calibration", "held-out"), self.wanted, self.windows, self.tokens, strict=True
        ):
            if wanted and not windows:
                raise ValueError(
                    f"{PREFIX}: expected {names} to have a window of {what} tokens, "
                    f"but got {sum(map(len, self.windows))} windows in all"
                )
            if tokens < wanted:
                said.append(f"{tokens} {what} tokens instead of {wanted}: {names} has no more")
        if not_read := [source.name for source in sources if not source.taken]:
            said.append(f"not read, as there were enough tokens before: {', '.join(not_read)}")
        for note in said:
            logger.warning("calibration: %s", note)
        return Calibration(
            batches=tuple(join(self.windows[0])),
            held_out=tuple(join(self.windows[1])),
            tokens=self.tokens[0],
            held_out_tokens=self.tokens[1],
            sources=tuple(
                SourceTokens(source.name, source.taken, sum(source.tokens), source.tokens[1]) for source in sources
            ),
            ships_with_package=ships_with_package,
            notes=tuple(said),
        )


def _batched(windows: Sequence[_Window], limit: int, pad: int) -> list[Batch]:
    """Batches of at most `limit` tokens with their padding: the longest windows first, so there is little of it."""
    batches: list[Batch] = []
    rows: list[_Window] = []

    def close() -> None:
        padded = torch.nn.utils.rnn.pad_sequence
        batches.append(
            {
                "input_ids": padded([row.ids for row in rows], batch_first=True, padding_value=pad),
                "attention_mask": padded([row.mask for row in rows], batch_first=True, padding_value=0),
            }
        )

    for window in sorted(windows, key=lambda window: -len(window.ids)):
        if rows and (len(rows) + 1) * len(rows[0].ids) > limit:
            close()
            rows = []
        rows.append(window)
    if rows:
        close()
    return batches


def given_batch(batch: Any, where: str, vocabulary: int = _NO_BOUND) -> GivenBatch:
    """A batch of the caller's with a mask, and its number of tokens.

    Raises:
        ValueError, TypeError: where it is none; the message begins with `where`.
    """
    if isinstance(batch, Tensor):
        if batch.dim() not in (1, 2):
            raise ValueError(f"{where}: expected token ids [B, L] or [L], but got shape {list(batch.shape)}")
        batch = {"input_ids": batch.reshape(-1, batch.shape[-1])}
    if not isinstance(batch, Mapping) or not all(isinstance(name, str) for name in batch):
        raise TypeError(
            f"{where}: expected a tensor of token ids or a mapping of a model's arguments, "
            f"but got {reprlib.repr(batch)}"
        )
    if not any(isinstance(value, Tensor) for value in batch.values()):
        raise TypeError(f"{where}: expected a tensor among the arguments, but got {', '.join(batch) or 'none'}")
    arguments = dict(batch)
    ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
    if ids is not None:
        if not isinstance(ids, Tensor) or ids.dim() != 2:
            got = f"shape {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
            raise ValueError(f"{where}: expected input_ids to be a tensor [B, L], but got {got}")
        arguments["input_ids"] = ids = _checked_ids(ids, where, vocabulary)
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.dim() != 2 or (ids is not None and mask.shape != ids.shape):
            expected = "[B, L]" if ids is None else f"{list(ids.shape)}, as input_ids"
            got = f"shape {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{where}: expected attention_mask to be a tensor {expected}, but got {got}")
        arguments["attention_mask"] = _checked_mask(mask, where)
    elif ids is not None:
        arguments["attention_mask"] = torch.ones_like(ids)
    elif not isinstance(decoder_ids := arguments.get("decoder_input_ids"), Tensor):
        return GivenBatch(arguments, 0)
    else:
        return GivenBatch(arguments, decoder_ids.numel())
    if not (tokens := int(arguments["attention_mask"].sum())):
        raise ValueError(f"{where}: expected a token that counts, but attention_mask is 0 everywhere")
    return GivenBatch(arguments, tokens)


def _checked_ids(ids: Tensor, where: str, vocabulary: int) -> Tensor:
    """Token ids as int64."""
    if ids.dtype not in _INTEGERS:
        raise ValueError(f"{where}: expected token ids to be integers, but got {str(ids.dtype).removeprefix('torch.')}")
    ids = ids.long()
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        bound = f" and less than {vocabulary}, the vocabulary" if vocabulary < _NO_BOUND else ""
        raise ValueError(
            f"{where}: expected token ids to be at least 0{bound}, but got {int(ids.min())} to {int(ids.max())}"
        )
    return ids


def _checked_mask(mask: Tensor, where: str) -> Tensor:
    """A mask of zeros and ones as int64."""
    whole = mask.long()
    if not bool(((mask == 0) | (mask == 1)).all()):
        raise ValueError(f"{where}: expected attention_mask to be 0 or 1 everywhere, but got other values")
    return whole


@dataclass(frozen=True, eq=False)
class _Text:
    """A text or a piece of one."""

    text: str
    where: str
    ends: bool  # or more of it comes
    is_chat: bool = False


class _Reader:
    """Windows of files."""

    def __init__(self, tokenizer: Tokenizer | None, length: int, short: Short, vocabulary: int) -> None:
        self.tokenizer: Any = tokenizer
        self.length = length
        self.vocabulary = vocabulary
        self.empty: Counter[str] = Counter()  # texts without a token, by name of the source
        self.packs = short == "pack" or (short == "auto" and getattr(tokenizer, "mask_token", None) is None)

    def windows(self, path: Path, name: str) -> Iterator[_Window]:
        """The windows of a file or folder, which is looked at before the first is taken."""
        files = data_files(path) if path.is_dir() else [path]
        for file in files:
            with file.open("rb"):  # an OSError that names the file, before work starts
                pass
            suffix = file.suffix.lower()
            if suffix in PICKLES:
                raise ValueError(
                    f"{PREFIX}: {file}: expected a tensor file in .safetensors or .npy, but got {suffix}, which "
                    "may run code when it is read; save the token ids with safetensors"
                )
            if suffix not in SUFFIXES:
                raise ValueError(
                    f"{PREFIX}: {file}: expected a folder or a file that ends in {', '.join(SUFFIXES)}, "
                    f"but got {suffix or 'no ending'}"
                )
        if files[0].suffix.lower() in TENSOR_SUFFIXES:
            return itertools.chain.from_iterable(map(self._tensor_windows, files))
        if not callable(self.tokenizer):
            raise TypeError(
                f"{PREFIX}: expected a tokenizer for {name}, that is called with a text, but got "
                f"{type(self.tokenizer).__name__}"
            )
        return self._text_windows(itertools.chain.from_iterable(map(self._texts, files)), name)

    def _texts(self, file: Path) -> Iterator[_Text]:
        """The texts of a file, long ones in pieces."""
        suffix = file.suffix.lower()
        if suffix in TEXT_SUFFIXES:
            where = f"{PREFIX}: {file}"
            return (_Text(text, where, ends=is_last) for text, is_last in pieces(file))
        rows = lines(file) if suffix in LINE_SUFFIXES else table_rows(file)
        return (self._text_of(row, where) for where, row in rows)

    def _text_of(self, row: Mapping[str, Any], where: str) -> _Text:
        """The text of a row, or what the chat template makes of its messages."""
        found = [key for key in ("text", "messages") if key in row]
        if len(found) != 1:
            got = "both" if found else ", ".join(map(repr, itertools.islice(row, 10))) or "no key"
            raise ValueError(f"{where}: expected either a text or messages, but got {got}")
        if found == ["messages"]:
            return _Text(self._chat(row["messages"], where), where, ends=True, is_chat=True)
        if not isinstance(row["text"], str):
            raise ValueError(f"{where}: expected text to be a string, but got {reprlib.repr(row['text'])}")  # noqa: TRY004
        return _Text(row["text"], where, ends=True)

    def _chat(self, messages: Any, where: str) -> str:
        """Messages as the tokenizer's chat template writes them."""
        if not isinstance(messages, list) or not messages:
            raise ValueError(
                f"{where}: expected messages to be a list that is not empty, but got {reprlib.repr(messages)}"
            )
        for number, message in enumerate(messages, start=1):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str) or "content" not in message:
                raise ValueError(
                    f"{where}: expected message {number} to have a role and content, but got {reprlib.repr(message)}"
                )
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(f"{where}: expected a tokenizer with a chat template for messages, but got one without")
        from jinja2 import TemplateError  # noqa: PLC0415  (torch asks for it)

        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            raise ValueError(
                f"{where}: expected messages that the tokenizer's chat template takes, but got: {error}"
            ) from error

    def _encode(self, text: str, *, special: bool = False) -> list[int]:
        """The token ids of a text, alone or with the special tokens around it."""
        ids = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return [int(token) for token in ids]

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and after a text."""
        alone, whole = self._encode("a"), self._encode("a", special=True)
        for start in range(len(whole) - len(alone) + 1):
            if whole[start : start + len(alone)] == alone:
                return whole[:start], whole[start + len(alone) :]
        raise ValueError(
            f"{PREFIX}: expected a tokenizer that puts special tokens around a text, but got one that turns "
            f"{alone} into {whole}"
        )

    def _text_windows(self, texts: Iterable[_Text], name: str) -> Iterator[_Window]:
        """The windows of texts, packed or one by one."""
        before, after = self._special_tokens()
        room = self.length - len(before) - len(after)
        if room < 1:
            raise ValueError(
                f"{PREFIX}: expected sequence_length to be at least {self.length - room + 1} with the "
                f"tokenizer's special tokens, but got {self.length}"
            )
        separator = getattr(self.tokenizer, "eos_token_id", None) if self.packs else None
        buffer: list[int] = []

        def cut(least: int) -> Iterator[_Window]:
            """Windows from the front of the buffer, while it has so many tokens."""
            while len(buffer) >= least:
                front = [] if before and buffer[: len(before)] == before else before  # a chat template may write them
                size = self.length - len(front) - len(after)
                ids = torch.tensor([*front, *buffer[:size], *after])
                yield _Window(ids, torch.ones_like(ids))
                del buffer[:size]

        for text in texts:
            try:
                text.text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{text.where}: expected text of Unicode characters, but got the surrogate "
                    f"U+{ord(text.text[error.start]):04X}"
                ) from error
            ids = self._encode(text.text)
            self.empty[name] += not ids
            buffer += ids
            if ids and text.ends and separator is not None and not text.is_chat:
                buffer.append(separator)
            yield from cut(self.length)
            if text.ends and not self.packs:
                yield from cut(1)
        if buffer != [separator]:
            yield from cut(1)

    def _tensor_windows(self, file: Path) -> Iterator[_Window]:
        """The windows of a file of token ids."""
        rows = npy_rows if file.suffix.lower() == ".npy" else safetensors_rows
        for number, (row, mask_of_row) in enumerate(rows(file, self.length), start=1):
            where = f"{PREFIX}: {file}: row {number}"
            ids, mask = _checked_ids(row, where, self.vocabulary), _checked_mask(mask_of_row, where)
            if not mask.any():
                raise ValueError(f"{where}: expected a token that counts, but attention_mask is 0 everywhere")
            for start in range(0, len(ids), self.length):
                part = slice(start, start + self.length)
                if mask[part].any():
                    yield _Window(ids[part], mask[part])
