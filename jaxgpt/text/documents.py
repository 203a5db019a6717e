"""Documents in text files, JSONL and parquet, compressed or not, in blocks of 1 MB.

One process reads blocks of raw bytes in order; others parse them. A text file is a
document; so is each line of JSONL that is not blank, and each row of parquet.
"""

import codecs
import glob
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from jaxgpt.text.tokenizer import without_surrogates

_LINES, _ROWS, _TEXT = (".jsonl", ".ndjson", ".json"), (".parquet",), (".txt",)
_CODECS = {".gz": "gzip", ".zst": "zstd"}
_BLOCK = 1 << 20  # bytes of text that are read at once
_FILES = 1000  # text files in a block, at most
_BATCH_ROWS = 64  # of parquet, which are decoded at once
# What pyarrow raises for files that are damaged, or of a kind that it can't read.
_PYARROW_ERRORS = (OSError, ValueError, NotImplementedError)
_EXPECTED = (
    "give files, patterns such as 'data/*.parquet', or folders with *.txt, *.jsonl, "
    "*.ndjson or *.parquet files; all but parquet may also end in .gz or .zst, and "
    "*.json, which is left out of folders, is read as JSONL"
)


class InputFile(NamedTuple):
    """A file to read."""

    name: str  # relative to the parent of the input that led to it
    path: Path
    size: int
    mtime_ns: int  # when it was last changed


class Position(NamedTuple):
    """Where a block begins or ends."""

    file: int = 0  # index of the file
    offset: int = 0  # in bytes without compression, or in rows of parquet
    record: int = 0  # number of lines or rows before it
    stored: int = 0  # bytes of the file, as it is stored, that are read until there


START = Position()


@dataclass(frozen=True)
class Block:
    """A part of the input as it was read, at most about 1 MB; a worker parses it.

    Attributes:
      start, end: its position, and that of the next block.
      paths: the file, or several text files.
      data: whole lines, or a value for each row; None if the files are yet to be read.
      field: name of the field with the text.
      problem: why the rest of the file can't be read, if it can't.
      ends: whether the files end here.
    """

    start: Position
    end: Position
    paths: list[Path]
    data: bytes | list[bytes | None] | None
    field: str
    problem: str = ""
    ends: bool = True


class Document(NamedTuple):
    """A document, or why it can't be used."""

    file: int  # index in the block's paths
    where: str  # file, and line or row
    text: str = ""
    problem: str = ""  # its kind
    detail: str = ""


def find_inputs(inputs: Sequence[str], without: Sequence[Path] = ()) -> list[InputFile]:
    """Finds the files that inputs name; see `find_files`.

    Args:
      inputs: files, folders or patterns.
      without: folders whose own files are left out, unless they are given by name.
    """
    files = []
    if not inputs:
        raise FileNotFoundError(f"there is no input; {_EXPECTED}")
    left_out = [folder.resolve() for folder in without]
    for given in inputs:
        path = Path(given)
        matches = [path]
        if not path.exists():
            matches = [
                Path(match) for match in sorted(glob.glob(given, recursive=True))
            ]
        found = [
            (Path(match.resolve().name, file.relative_to(match)).as_posix(), file)
            for match in matches
            for file in _files_in(match)
            if file == path or file.resolve().parent not in left_out
        ]
        for _, file in [*found, ("", path)]:
            pipe = file.exists() and not (file.is_file() or file.is_dir())
            if pipe or given == "-":
                raise ValueError(
                    f"{file} is not a regular file, and files are read more than once; "
                    "save it first, as in `zcat text.gz > text.txt`"
                )
        if not found:
            what = "has no such files" if path.is_dir() else "does not exist"
            raise FileNotFoundError(f"{path.absolute()} {what}; {_EXPECTED}")
        for name, file in found:
            stat = file.stat()
            files.append(InputFile(name, file, stat.st_size, stat.st_mtime_ns))
    return files


def find_files(inputs: Sequence[str]) -> list[Path]:
    """Finds files in order: given ones, those that match patterns, those in folders.

    Of a folder and its subfolders it takes text, JSONL and parquet, sorted, but nothing
    hidden. Raises OSError if there are none, ValueError if one can't be read twice.
    """
    return [file.path for file in find_inputs(inputs)]


def _files_in(path: Path) -> list[Path]:
    """The path itself, or the files of known kinds in the folder there."""
    if not path.is_dir():
        return [path]

    def fail(error: OSError) -> None:
        raise error

    files: list[Path] = []
    for folder, subfolders, names in os.walk(path, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        shown = (Path(folder, name) for name in names if not name.startswith("."))
        known = (file for file in shown if _kind(file) in _LINES + _ROWS + _TEXT)
        # A *.json in a folder is mostly about the data.
        files += [file for file in known if file.suffix.lower() != ".json"]
    return sorted(files)


def _kind(path: Path) -> str:
    """The suffix that says what a file holds, in lower case, without compression's."""
    name = path.with_suffix("") if _codec(path) else path
    return name.suffix.lower()


def _codec(path: Path) -> str | None:
    return _CODECS.get(path.suffix.lower())


def is_records(path: Path) -> bool:
    """Whether a file has many documents: JSONL, compressed or not, or parquet."""
    return _kind(path) in _LINES + _ROWS


def read_blocks(
    inputs: Sequence[InputFile], field: str, start: Position = START
) -> Iterator[Block]:
    """Yields blocks of the files in order, from a position at which a block began.

    From there on the blocks are the same as from the start, also those of a damaged
    file. JSONL and parquet files end with an empty block; its `problem` says why the
    rest of the file can't be read, if it can't.
    """
    files = range(start.file, len(inputs))
    for records, group in groupby(files, lambda n: is_records(inputs[n].path)):
        if not records:
            yield from _group_texts(inputs, list(group), field)
            continue
        for file in group:
            first = start if file == start.file else Position(file)
            yield from _read_records(inputs[file], field, first)


def _group_texts(
    inputs: Sequence[InputFile], files: Sequence[int], field: str
) -> Iterator[Block]:
    """Yields blocks of text files, which the workers read."""
    while files:
        sizes = np.cumsum([inputs[n].size for n in files[:_FILES]])
        count = 1 + int(np.searchsorted(sizes[:-1], _BLOCK))
        paths = [inputs[n].path for n in files[:count]]
        yield Block(Position(files[0]), Position(files[0] + count), paths, None, field)
        files = files[count:]


def _read_records(file: InputFile, field: str, start: Position) -> Iterator[Block]:
    """Yields blocks of a file of lines or rows, then an empty one."""
    position, problem = start, ""
    reads = _read_rows if _kind(file.path) in _ROWS else _read_lines
    try:
        for data, records, stored in reads(file, field, start.offset):
            step = records if isinstance(data, list) else len(data)
            _, offset, record, _ = position
            end = Position(start.file, offset + step, record + records, stored)
            yield Block(position, end, [file.path], data, field, ends=False)
            position = end
    except _PYARROW_ERRORS as error:
        problem = str(error)
    end = Position(start.file + 1)
    yield Block(position, end, [file.path], b"", field, problem)


def _read_lines(
    source: InputFile, field: str, start: int
) -> Iterator[tuple[bytes, int, int]]:
    """Yields whole lines, their number, and how much of the file is read.

    Reads begin at multiples of a block, wherever `start` is: a read that fails gives
    nothing of what is before the damage.
    """
    with source.path.open("rb") as stored:
        file, (blocks, skip) = _decompressed(stored, source.path), divmod(start, _BLOCK)
        if file is stored:
            file.seek(blocks * _BLOCK)
        else:
            for _ in range(blocks):
                file.read(_BLOCK)
        rest: list[bytes] = []
        while data := file.read(_BLOCK):
            head, newline, tail = data[skip:].rpartition(b"\n")
            skip = 0
            if newline:
                lines = b"".join([*rest, head, newline])
                yield lines, lines.count(b"\n"), stored.tell()
                rest = []
            rest.append(tail)
        if last := b"".join(rest):
            yield last, 1, stored.tell()


def _decompressed(stored: IO[bytes], path: Path) -> IO[bytes]:
    """What an open file holds; the file itself if it is not compressed."""
    if not (codec := _codec(path)):
        return stored
    import pyarrow  # only where it is needed: it takes 0.2 s and 40 MB

    return pyarrow.CompressedInputStream(stored, codec)


def _read_rows(
    source: InputFile, field: str, start: int
) -> Iterator[tuple[list[bytes | None], int, int]]:
    """Yields the values of rows, their number, and how much of the file is read."""
    from pyarrow import large_binary, parquet, types

    # So it reads page by page, not a column of a whole row group at once.
    options = {"buffer_size": _BLOCK, "pre_buffer": False}
    with parquet.ParquetFile(source.path, **options) as file:
        schema, metadata = file.schema_arrow, file.metadata
        if field not in schema.names:
            raise ValueError(f"no column {field!r}, only {', '.join(schema.names)}")
        kind = schema.field(field).type
        kind = kind.value_type if types.is_dictionary(kind) else kind
        if not re.fullmatch("(large_)?(string|binary)(_view)?", str(kind)):
            raise ValueError(f"column {field!r} holds {kind}, not text")
        values: list[bytes | None] = []
        size = position = stored = 0
        try:
            for group in range(metadata.num_row_groups):
                rows = metadata.row_group(group).num_rows
                if position + rows <= start:
                    position += rows
                    continue
                for batch in file.iter_batches(
                    _BATCH_ROWS, [group], [field], use_threads=False
                ):
                    position += len(batch)
                    if position <= start:  # a block ends where a batch does
                        continue
                    values += batch.column(0).cast(large_binary()).to_pylist()
                    size += batch.nbytes
                    stored = source.size * position // metadata.num_rows
                    if size >= _BLOCK:
                        yield values, len(values), stored
                        values, size = [], 0
        except _PYARROW_ERRORS:
            if values:
                yield values, len(values), stored
            raise
        if values:
            yield values, len(values), stored


def parse(block: Block) -> Iterator[Document]:
    """Yields the documents of a block, those that can't be used with their problem."""
    record, (path, *_) = block.start.record, block.paths
    if block.data is None:
        yield from map(_read_text, range(len(block.paths)), block.paths)
    elif isinstance(block.data, list):
        for row, value in enumerate(block.data, record + 1):
            yield _document(0, f"{path}, row {row}", value)
    else:
        bom = b"" if block.start.offset else codecs.BOM_UTF8
        lines = block.data.removeprefix(bom).split(b"\n")
        for number, line in enumerate(lines, record + 1):
            if line and not line.isspace():
                yield _parse_line(f"{path}:{number}", line, block.field)
    if block.problem:
        where = f"{path}, after record {record}" if record else str(path)
        yield Document(0, where, problem="unreadable", detail=block.problem)


def _read_text(file: int, path: Path) -> Document:
    """Reads a text file."""
    try:
        with path.open("rb") as stored:
            utf8 = _decompressed(stored, path).read()
    except OSError as error:
        return Document(file, str(path), problem="unreadable", detail=str(error))
    return _document(file, str(path), utf8.removeprefix(codecs.BOM_UTF8))


def _parse_line(where: str, line: bytes, field: str) -> Document:
    """Parses a line of JSONL."""
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError:
        return _document(0, where, line)
    except (ValueError, RecursionError) as error:
        return Document(0, where, problem="broken JSON", detail=str(error))
    if not isinstance(values, dict) or field not in values:
        names = ", ".join(values) if isinstance(values, dict) else "no object"
        detail = f"there is no field {field!r}, but {names:.200}"
        if "messages" in names:
            detail += ", as train.py reads with --data.packing conversations"
        return Document(0, where, problem="no text", detail=detail)
    return _document(0, where, values[field])


def _document(file: int, where: str, value: Any) -> Document:
    """Makes a document of UTF-8 text or of a string; surrogates become U+FFFD."""
    try:
        text = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        detail = f"{error.reason} at byte {error.start}"
        return Document(file, where, problem="not UTF-8", detail=detail)
    if not isinstance(text, str):
        detail = f"the field holds {json.dumps(value):.50}"
        return Document(file, where, problem="no text", detail=detail)
    if not text:
        return Document(file, where, problem="empty")
    return Document(file, where, text if text.isascii() else without_surrogates(text))
