"""Turns documents into a folder of token shards; see `jaxgpt.text.shards`.

Until all is done, the files are in a folder `unfinished` within it. They only grow, and
every few seconds `state.json` records how far all of them belong to whole blocks of the
input; a later run truncates them to that, and goes on. The result depends neither on
interruptions nor on the number of workers.
"""

import dataclasses
import hashlib
import heapq
import json
import os
import re
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np

try:
    import fcntl
except ImportError:  # Windows has no flock, so folders are not locked
    fcntl = None  # type: ignore[assignment]

from jaxgpt.files import TMP_SUFFIX, delete, replace_file
from jaxgpt.terminal import progress
from jaxgpt.text import passes
from jaxgpt.text.documents import (
    START,
    Block,
    Document,
    InputFile,
    Position,
    find_inputs,
    read_blocks,
)
from jaxgpt.text.pretrained import NAMES, find_tokenizer
from jaxgpt.text.shards import ENDS_DTYPE, MANIFEST, SPLITS, Manifest, Shard
from jaxgpt.text.tokenizer import (
    END_OF_TEXT,
    BPETokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
)
from jaxgpt.text.workers import ordered_map

TOKENIZER, LOCK, UNFINISHED = "tokenizer.json", "lock", "unfinished"
# In the folder of unfinished work: the files that are read, the digests of the
# documents that are kept, and how far all files are whole.
_SOURCES, _DIGESTS, _STATE = "sources", "digests", "state.json"
_SAVE_SECONDS = 5
_DIGEST_BYTES = 64  # of memory for a digest of 16, besides its place in the set
_SAMPLE = 64 << 20  # bytes of text that BPE learns from, at most
_LARGEST_VOCABULARY = 1 << 24
_OURS = re.compile(rf"(train|val)_\d+\.(bin|ends)|{TOKENIZER}")


@dataclass
class _State:
    """How far the work is.

    Attributes:
      key: identifies the settings and the input files.
      position: where the next block begins.
      lengths: of all files but state.json, in bytes.
      shards: those that are closed.
      open: the one that grows, for each split that has one.
      utf8_bytes, end_of_texts: size of the text, and how often it has END_OF_TEXT.
      file_counts: documents of the current file that are used, and that are skipped.
      problems: count, first place and its detail, for each kind.
      done: whether all shards are closed.
    """

    key: str
    position: Position = START
    lengths: dict[str, int] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    open: dict[str, Shard] = field(default_factory=dict)
    documents: int = 0
    duplicates: int = 0
    utf8_bytes: int = 0
    end_of_texts: int = 0
    file_counts: list[int] = field(default_factory=lambda: [0, 0])
    problems: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    done: bool = False

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Reads state.json, which is what `save` wrote."""
        values = json.loads((folder / _STATE).read_bytes())
        values["position"] = Position(*values["position"])
        values["shards"] = [Shard(**shard) for shard in values["shards"]]
        values["open"] = {split: Shard(**s) for split, s in values["open"].items()}
        return cls(**values)

    def save(self, folder: Path) -> None:
        """Writes state.json once all that it says is on disk."""
        closed = {name for shard in self.shards for name in _files_of(shard)}
        for name in self.lengths.keys() - closed:  # `_close` has waited for those
            _sync(folder / name)
        text = json.dumps(dataclasses.asdict(self))

        def write(path: Path) -> None:
            path.write_text(text, "utf-8")
            _sync(path)

        replace_file(folder / _STATE, write)
        _sync(folder)

    def append(self, folder: Path, name: str, content: bytes) -> None:
        """Appends to a file."""
        with (folder / name).open("ab") as file:
            file.write(content)
        self.lengths[name] = self.lengths.get(name, 0) + len(content)


def _sync(path: Path) -> None:
    """Waits until a file, or which files a folder has, is on disk; not on Windows."""
    if os.name == "posix":
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def _files_of(shard: Shard) -> tuple[str, str]:
    return shard.name, shard.ends_name


def prepare(
    inputs: Sequence[str],
    out_dir: Path,
    *,
    tokenizer: str,
    vocab_size: int | None = None,
    text_field: str = "text",
    val_fraction: float = 0.01,
    dedup: bool = False,
    on_error: Literal["stop", "skip"] = "stop",
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    log: Callable[[str], None],
) -> Manifest:
    """Tokenizes documents into a folder of shards; see `jaxgpt prepare --help`.

    Goes on where an interrupted run of the same settings and files was, and returns at
    once if one has finished. Raises ValueError for a document that can't be used,
    unless they are skipped, or if none is left; FileExistsError if the folder has
    anything else.
    """
    settings = {
        "tokenizer": tokenizer if tokenizer in NAMES else TOKENIZER,
        "vocab_size": vocab_size,
        "text_field": text_field,
        "val_fraction": val_fraction,
        "dedup": dedup,
        "shard_tokens": shard_tokens,
    }
    _check_settings(settings, workers)
    own = None
    if tokenizer not in ("char", "bpe"):
        own = _with_end(find_tokenizer(tokenizer, log), tokenizer)
    sha256 = hashlib.sha256(own.to_json().encode()).hexdigest() if own else None
    folder = out_dir / UNFINISHED
    files = _find_once(inputs, [out_dir, folder])
    with _claimed(out_dir, log):
        if (out_dir / MANIFEST).exists():
            manifest = _check_finished(out_dir, settings, files, sha256)
            if not (damaged := _damaged(out_dir, manifest)):
                delete(folder)
                log(f"{out_dir} is complete")
                return manifest
            log(f"{damaged} is missing or damaged: {out_dir} is prepared anew")
            delete(out_dir / MANIFEST)
        state = _resume(out_dir, _key(settings, files, sha256), log)
        run = _Run(folder, settings, files, on_error, workers or _cores(), log)
        if not state.done:
            if TOKENIZER not in state.lengths:
                text = (own or _make_tokenizer(run)).to_json()
                state.append(folder, TOKENIZER, text.encode())
                state.save(folder)
            del own
            _tokenize(run, state)
            _check_unchanged(files)
        return _finish(run, state)


@dataclass(frozen=True)
class _Run:
    """What the steps of a run share."""

    folder: Path
    settings: dict[str, Any]
    files: list[InputFile]
    on_error: Literal["stop", "skip"]
    workers: int
    log: Callable[[str], None]

    @property
    def val_below(self) -> int:
        """A document is for validation if its digest's first integer is below this."""
        return int(self.settings["val_fraction"] * 2**64)

    def blocks(self, start: Position = START) -> Iterator[Block]:
        """The blocks of the input from a position on."""
        return read_blocks(self.files, self.settings["text_field"], start)

    def map(
        self,
        label: str,
        function: Callable[[Any], Any],
        blocks: Iterable[Any],
        start: Position = START,
        note: Callable[[], str] = str,
    ) -> Generator[tuple[passes.Read, Any], None, None]:
        """Yields what the workers make of blocks, in order, and shows the progress.

        Raises _UnusableError at the first document that can't be used, unless it is to
        be skipped.
        """
        sizes = [0, *accumulate(file.size for file in self.files)]

        def done(position: Position) -> int:
            return sizes[position.file] + position.stored

        results = ordered_map(function, blocks, self.workers)
        total = sizes[-1] - done(start)
        with progress(label, total, note) as advance, closing(results):
            for read, result in results:
                if read.problems and self.on_error == "stop":
                    raise _unusable(read.problems[0])
                yield read, result
                advance(done(read.end) - done(start))
                start = read.end


class _UnusableError(ValueError):
    """A document can't be used."""


def _unusable(document: Document) -> _UnusableError:
    detail = f" ({document.detail})" if document.detail else ""
    return _UnusableError(
        f"{document.where}: {document.problem}{detail}; fix it, or leave out all such "
        "documents with `python -m jaxgpt prepare` and --on-error skip"
    )


def _find_once(inputs: Sequence[str], without: Sequence[Path]) -> list[InputFile]:
    """Finds the input files, one that is named several times at its first place.

    Raises ValueError for a table in a format that would be read as one text.
    """
    files: dict[Path, InputFile] = {}
    for file in find_inputs(inputs, without):
        if file.path.suffix.lower() in (".csv", ".tsv"):
            raise ValueError(
                f"{file.path} is a table, not a text; save it as JSONL or parquet"
            )
        files.setdefault(file.path.resolve(), file)
    return list(files.values())


def _check_settings(settings: dict[str, Any], workers: int | None) -> None:
    """Raises ValueError for settings that contradict each other or are out of range."""
    tokenizer, vocab_size = settings["tokenizer"], settings["vocab_size"]
    if (tokenizer == "bpe") != (vocab_size is not None):
        raise ValueError(
            f"--vocab-size {vocab_size} with --tokenizer {tokenizer}: bpe needs a "
            "size, as in --vocab-size 4096, and the other tokenizers have their own"
        )
    if vocab_size is not None and not 257 <= vocab_size <= _LARGEST_VOCABULARY:
        raise ValueError(
            f"--vocab-size {vocab_size} must be from 257, for all bytes and the end "
            f"token, to {_LARGEST_VOCABULARY}"
        )
    if not 0 <= (fraction := settings["val_fraction"]) < 1:
        raise ValueError(f"--val-fraction {fraction} must be at least 0 and below 1")
    if not 0 < (tokens := settings["shard_tokens"]) <= passes.LONGEST:
        raise ValueError(f"--shard-tokens {tokens} must be from 1 to {passes.LONGEST}")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers {workers} must be at least 1")


def _with_end(tokenizer: Tokenizer, name: str) -> Tokenizer:
    """Returns the tokenizer; raises ValueError if it has no end token."""
    if tokenizer.end_of_text is None:
        advice = "use one that has it"
        if isinstance(tokenizer, CharTokenizer):
            advice = f'add "special": ["{END_OF_TEXT}"] to a copy of its tokenizer.json'
        raise ValueError(
            f"--tokenizer {name} has no token {END_OF_TEXT}, which has to follow every "
            f"document; {advice}, or use --tokenizer char, bpe or gpt2"
        )
    return tokenizer


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS and Windows
        return len(os.sched_getaffinity(0))  # those this process may use
    return os.cpu_count() or 1


@contextmanager
def _claimed(out_dir: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Creates the folder if needed, and locks it against other runs of `prepare`.

    Waits for the other run if there is one. Raises FileExistsError if the folder has
    foreign files.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise FileExistsError(f"--out-dir {out_dir} is a file; choose another")
    found = {path.name for path in out_dir.iterdir()} if out_dir.exists() else set()
    ours = {LOCK}
    if {LOCK, UNFINISHED} <= found:
        ours |= {UNFINISHED, *filter(_OURS.fullmatch, found)}
    foreign = {name for name in found - ours if not name.endswith(TMP_SUFFIX)}
    if foreign and MANIFEST not in found:
        raise FileExistsError(
            f"--out-dir {out_dir} is not a prepared corpus: it has {min(foreign)}; "
            "choose another directory"
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    with (out_dir / LOCK).open("w") as lock:
        if fcntl:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                log(f"waiting for another process that prepares {out_dir}")
                fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check_finished(
    out_dir: Path,
    settings: dict[str, Any],
    files: Sequence[InputFile],
    tokenizer: str | None,
) -> Manifest:
    """Returns the folder's manifest; raises FileExistsError if it is of other work.

    Args:
      tokenizer: sha256 of the given tokenizer, if one is given.
    """
    manifest = Manifest.load(out_dir)
    made_of = [(source["name"], source["bytes"]) for source in manifest.sources]
    differs = [key for key in settings if settings[key] != manifest.settings.get(key)]
    if tokenizer not in (None, manifest.tokenizer):
        differs.append("tokenizer")
    if made_of != [(file.name, file.size) for file in files]:
        differs.append("input files")
    if not differs:
        with progress("checking files", sum(file.size for file in files)) as advance:
            for file, source in zip(files, manifest.sources, strict=True):
                if passes.input_sha256(file.path) != source["sha256"]:
                    differs = [f"input files: {file.name}"]
                    break
                advance(file.size)
    if differs:
        names = ", ".join(name.replace("_", "-") for name in differs)
        raise FileExistsError(
            f"--out-dir {out_dir} holds a corpus of other settings ({names}); delete "
            "it, or choose another directory"
        )
    return manifest


def _damaged(out_dir: Path, manifest: Manifest) -> Path | None:
    """The first file of a finished folder that is not as the manifest says."""
    digests = {shard.name: shard.sha256 for shard in manifest.shards}
    for name, sha256 in (digests | {TOKENIZER: manifest.tokenizer}).items():
        path = out_dir / name
        if not path.is_file() or passes.sha256_of(path) != sha256:
            return path
    for shard in manifest.shards:
        path, size = out_dir / shard.ends_name, shard.documents * ENDS_DTYPE.itemsize
        if not path.is_file() or path.stat().st_size != size:
            return path
    return None


def _check_unchanged(files: Sequence[InputFile]) -> None:
    """Raises ValueError if a file has changed; one that is gone was skipped."""
    for file in files:
        with suppress(FileNotFoundError):
            stat = file.path.stat()
            if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
                raise ValueError(
                    f"{file.path} has changed while it was read; run the same command "
                    "again, which prepares all files anew"
                )


def _key(
    settings: dict[str, Any], files: Sequence[InputFile], tokenizer: str | None
) -> str:
    """Identifies settings, tokenizer and input files without reading them."""
    states = [
        (file.name, str(file.path.resolve()), file.size, file.mtime_ns)
        for file in files
    ]
    values = json.dumps([settings, states, tokenizer])
    return hashlib.sha256(values.encode()).hexdigest()


def _resume(out_dir: Path, key: str, log: Callable[[str], None]) -> _State:
    """Returns the state of the work in the folder, or begins it."""
    folder = out_dir / UNFINISHED
    try:
        state = _State.load(folder)
        if state.key != key:
            log(f"settings or files have changed: {out_dir} is prepared anew")
        elif _truncate(folder, state):
            if state.position != START:
                log(f"going on after {state.documents:,} documents")
            return state
        else:
            log(f"files in {folder} are missing or too short: it is prepared anew")
    except FileNotFoundError:
        pass
    except (ValueError, TypeError, KeyError) as error:
        log(f"{folder / _STATE} is damaged ({error}): {out_dir} is prepared anew")
    for path in out_dir.iterdir():
        if _OURS.fullmatch(path.name):  # moved there, but not all
            delete(path)
    delete(folder)
    folder.mkdir()
    state = _State(key)
    state.save(folder)
    return state


def _truncate(folder: Path, state: _State) -> bool:
    """Truncates the files to the state's lengths; returns whether they had them."""
    for path in folder.iterdir():
        if path.name != _STATE and path.name not in state.lengths:
            delete(path)
    for name, length in state.lengths.items():
        path = folder / name
        if state.done and not path.exists():  # it has been moved
            path = folder.parent / name
        if not path.exists() or path.stat().st_size < length:
            return False
        os.truncate(path, length)
    return True


def _make_tokenizer(run: _Run) -> Tokenizer:
    """Makes a tokenizer of the documents, in one pass over them."""
    if run.settings["tokenizer"] == "char":
        found: set[str] = set()
        results = run.map("finding characters", passes.find_characters, run.blocks())
        with closing(results):
            for _, characters in results:
                found.update(characters)
        if not found:
            raise ValueError("there is no document left to make a vocabulary of")
        return CharTokenizer("".join(sorted(found)), [END_OF_TEXT])
    vocab_size = run.settings["vocab_size"]
    texts = _sample(run)
    size = sum(map(len, texts))
    run.log(f"learning {vocab_size:,} tokens from {size / 1e6:.1f} MB of text")
    return BPETokenizer.train(texts, vocab_size, documents=True)


def _sample(run: _Run) -> list[str]:
    """Returns the training documents of lowest order, up to 64 MiB of UTF-8.

    The last one is cut. The sample does not depend on the order of the documents.
    """
    heap: list[tuple[int, bytes, bytes]] = []  # of the negative order, for the highest
    total, below = 0, 1 << 64
    digests: set[bytes] = set()
    blocks = ((block, below) for block in run.blocks())  # `below` as it then is
    function = partial(passes.sample, val_below=run.val_below, limit=_SAMPLE)
    with closing(run.map("sampling", function, blocks)) as results:
        for _, samples in results:
            for order, digest, utf8 in samples:
                if order >= below or digest in digests:
                    continue
                if run.settings["dedup"]:
                    digests.add(digest)
                heapq.heappush(heap, (-order, digest, utf8))
                total += len(utf8)
                while total - len(heap[0][2]) >= _SAMPLE:
                    total -= len(heapq.heappop(heap)[2])
                if total >= _SAMPLE:
                    below = -heap[0][0]
    texts = [utf8 for _, _, utf8 in sorted(heap, reverse=True)]
    if total > _SAMPLE:
        texts[-1] = texts[-1][: _SAMPLE - total]
    return [utf8.decode(errors="ignore") for utf8 in texts]


def _tokenize(run: _Run, state: _State) -> None:
    """Writes the shards, from where the state says."""
    folder, settings, log = run.folder, run.settings, run.log
    started, before = time.monotonic(), state.utf8_bytes
    saved, seen = started, set[bytes]()
    if settings["dedup"] and state.documents:
        content = (folder / _DIGESTS).read_bytes()
        seen = {content[n : n + 16] for n in range(0, len(content), 16)}

    def speed() -> str:
        return f"{(state.utf8_bytes - before) / 1e6 / (time.monotonic() - started):.1f}"

    results = run.map(
        "tokenizing",
        partial(passes.tokenize, tokenizer=folder.resolve() / TOKENIZER),
        run.blocks(state.position),
        state.position,
        lambda: f"{state.documents:,} documents, {speed()} MB/s, ",
    )
    with closing(results):
        try:
            for read, result in results:
                _add(run, state, read, result, seen)
                if time.monotonic() - saved > _SAVE_SECONDS:
                    state.save(folder)
                    saved = time.monotonic()
        except _UnusableError:  # all before the document's block is kept
            state.save(folder)
            raise
    for split in list(state.open):
        _close(folder, state, split)
    state.done = True
    state.save(folder)
    size = (state.utf8_bytes - before) / 1e6
    seconds = time.monotonic() - started
    log(f"tokenized {size:,.1f} MB of text in {seconds:.1f} s, {speed()} MB/s")
    if settings["dedup"]:
        size = (sys.getsizeof(seen) + len(seen) * _DIGEST_BYTES) / 1e6
        log(f"the index of {len(seen):,} documents took {size:,.1f} MB")


def _add(
    run: _Run,
    state: _State,
    read: passes.Read,
    result: passes.Tokenized,
    seen: set[bytes],
) -> None:
    """Adds the documents of a block to the shards and the state."""
    folder, digests = run.folder, result.digests
    for document in read.problems:
        first = (0, document.where, document.detail)
        count, *place = state.problems.get(document.problem, first)
        state.problems[document.problem] = (count + 1, place[0], place[1])
    kept = np.ones(len(digests), bool)
    if run.settings["dedup"]:
        for n, digest in enumerate(map(bytes, digests)):
            kept[n] = digest not in seen
            seen.add(digest)
        state.append(folder, _DIGESTS, digests[kept].tobytes())
    is_val = digests[:, 0] < np.uint64(run.val_below)
    for split, chosen in zip(SPLITS, (kept & ~is_val, kept & is_val), strict=True):
        ids = result.ids[np.repeat(chosen, result.lengths)]
        _write(run, state, split, ids, result.lengths[chosen])
    for n, (used, skipped) in enumerate(result.sources):
        used, skipped = state.file_counts[0] + used, state.file_counts[1] + skipped
        state.file_counts = [used, skipped]
        if result.sha256:
            file = run.files[read.end.file - len(result.sources) + n]
            values: dict[str, Any] = {"name": file.name, "bytes": file.size}
            values |= {"sha256": result.sha256[n]}
            values |= {"documents": used, "skipped": skipped}
            state.append(folder, _SOURCES, json.dumps(values).encode() + b"\n")
            state.file_counts = [0, 0]
    state.documents += int(kept.sum())
    state.duplicates += int((~kept).sum())
    state.utf8_bytes += result.utf8_bytes
    state.end_of_texts += result.end_of_texts
    state.position = read.end


def _write(
    run: _Run, state: _State, split: str, ids: np.ndarray, lengths: np.ndarray
) -> None:
    """Appends documents to the open shard of a split, and closes those that are full.

    Args:
      ids: their tokens, one document after the other.
      lengths: number of tokens of each.
    """
    full = run.settings["shard_tokens"]
    while len(lengths):
        number = sum(shard.name.startswith(split) for shard in state.shards)
        new = Shard(f"{split}_{number:03d}.bin", 0, 0, 0, "")
        shard = state.open.get(split, new)
        ends = shard.tokens + np.cumsum(lengths)
        ends = ends[: 1 + np.searchsorted(ends[:-1], full)]
        count, documents = int(ends[-1]) - shard.tokens, len(ends)
        state.append(run.folder, shard.name, ids[:count].tobytes())
        state.append(run.folder, shard.ends_name, ends.astype(ENDS_DTYPE).tobytes())
        state.open[split] = dataclasses.replace(
            shard,
            tokens=int(ends[-1]),
            documents=shard.documents + documents,
            largest_token=max(shard.largest_token, int(ids[:count].max())),
        )
        if ends[-1] >= full:
            _close(run.folder, state, split)
        ids, lengths = ids[count:], lengths[documents:]


def _close(folder: Path, state: _State, split: str) -> None:
    """Closes the open shard of a split."""
    shard = state.open.pop(split)
    for name in _files_of(shard):
        _sync(folder / name)
    sha256 = passes.sha256_of(folder / shard.name)
    state.shards.append(dataclasses.replace(shard, sha256=sha256))


def _report(run: _Run, state: _State) -> None:
    """Says what is left out, and what is unexpected; raises ValueError if all is."""
    log = run.log
    for problem, (count, where, detail) in state.problems.items():
        detail = f" ({detail})" if detail else ""
        log(f"skipped {count:,} documents: {problem}; the first is {where}{detail}")
    if state.duplicates:
        log(f"dropped {state.duplicates:,} documents that repeat an earlier one")
    if state.end_of_texts:
        log(
            f"{END_OF_TEXT} is text like any other in documents (occurrences: "
            f"{state.end_of_texts:,})"
        )
    tokens = dict.fromkeys(SPLITS, 0)
    for shard in state.shards:
        tokens[shard.name.split("_")[0]] += shard.tokens
    if not state.documents:
        raise ValueError("no document is left; give files with documents")
    fraction = run.settings["val_fraction"]
    for split, other in zip(SPLITS, ("a smaller", "a larger"), strict=True):
        if not tokens[split]:
            log(
                f"no document is in the {split} split; give more documents, or {other} "
                f"--val-fraction than {fraction}"
            )


def _finish(run: _Run, state: _State) -> Manifest:
    """Moves the files to where they belong, and writes the manifest."""
    folder, out_dir = run.folder, run.folder.parent
    _report(run, state)
    shards = [
        shard
        for split in SPLITS
        for shard in state.shards
        if shard.name.startswith(split)
    ]
    names = [name for shard in shards for name in _files_of(shard)]
    for name in (*names, TOKENIZER):
        if (folder / name).exists():  # else an earlier run has moved it
            os.replace(folder / name, out_dir / name)
    _sync(out_dir)
    tokenizer = load_tokenizer(out_dir / TOKENIZER)
    lines = (folder / _SOURCES).read_text("utf-8").splitlines()
    manifest = Manifest(
        settings=run.settings,
        tokenizer=passes.sha256_of(out_dir / TOKENIZER),
        vocab_size=tokenizer.vocab_size,
        end_of_text=tokenizer.end_of_text or 0,
        sources=list(map(json.loads, lines)),
        documents=state.documents,
        duplicates=state.duplicates,
        shards=shards,
    )
    manifest.save(folder)
    _sync(folder / MANIFEST)
    os.replace(folder / MANIFEST, out_dir / MANIFEST)
    _sync(out_dir)
    delete(folder)
    for split in SPLITS:
        parts = manifest.split(split)
        count = sum(shard.documents for shard in parts)
        tokens = sum(shard.tokens for shard in parts)
        run.log(f"{split}: {count:,} documents, {tokens:,} tokens")
    return manifest
