"""Rows of files as they are found, and the documents that are searched.

    container      told by
    parquet        the name's end or the first bytes "PAR1"; needs `pip install pyarrow`
    gzip           the first bytes; what is inside is JSON
    JSON array     the first character is [; read as a whole
    JSON lines     anything else; one line in memory at a time
    hub data set   owner/name or owner/name:config/split, where no such file exists

What cannot be read is a UserError of one line that names the file, the row and what is legal.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAX_LINE = 2**28  # bytes; a file without line ends would fill the memory
DATA_FILE = re.compile(r"\.(parquet|jsonl?)(\.gz)?$")
HUB_ID = re.compile(r"([\w-][\w.-]*/[\w.-]+)(?::([\w./-]+))?")
BAD_ROW = (ValueError, KeyError, TypeError, AttributeError, RecursionError)


class UserError(Exception):
    """Something the user typed or named cannot be used: one line, exit code 2, no traceback."""


def reason(error: Exception) -> str:
    """An exception in a few words."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, UnicodeDecodeError):
        return f"byte {error.start} is no UTF-8 text"
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON: {error.msg} (column {error.colno})"
    if isinstance(error, RecursionError):
        return "nested too deeply"
    lines = str(getattr(error, "strerror", None) or error).splitlines()
    if len(lines) > 1 and lines[0].endswith(":"):  # the reason stands in the next one
        lines[0] += f" {lines[1].strip()}"
    return lines[0].rstrip(".") if lines else type(error).__name__


# ---- rows ---------------------------------------------------------------------------------


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A row or an object in it; of a key that is there twice, one value would be lost."""
    found = dict(sorted(pairs, key=lambda pair: pair[1] is not None))  # a null gives way
    for key, value in pairs:
        if value is not None and found[key] != value and READ.fullmatch(key):
            raise ValueError(f"the key {key!r} is there twice, with different values")
    return found


NAMES = "question|problem|query|prompt|answers?|solution|title|text|contents?"
READ = re.compile(f"(.*[_ ])?({NAMES})", re.IGNORECASE)
# NaN is how pandas writes null.
DECODER = json.JSONDecoder(parse_constant=lambda _: None, object_pairs_hook=once)


def read_rows(name: str, read: Callable[[Any], Any], legal: str) -> Iterator[tuple[str, Any]]:
    """(place, what `read` makes of the row there); its complaints get the place and `legal`."""
    for path in local_files(str(name)):
        for where, row in rows_of(path):
            place = f"{path}, {where}"
            try:
                row = DECODER.decode(row.decode()) if isinstance(row, bytes) else row
                yield place, read(with_plain_keys(row))
            except BAD_ROW as error:
                keys = [f"{key:.20}" for key in row][:9] if isinstance(row, dict) else []
                there = f"; its keys: {', '.join(keys)}" if keys else ""
                form = "JSON lines, a JSON array or parquet, of rows such as "
                form = form if isinstance(error, json.JSONDecodeError) else ""
                raise UserError(f"{place}: {reason(error)}; legal: {form}{legal}{there}") from None


def with_plain_keys(row: Any) -> dict[str, Any]:
    """Keys as most files have them: "final_answer" for "Final answer"; none of an empty cell."""
    if not isinstance(row, dict):
        raise ValueError(f"a row has keys, this is a {type(row).__name__}")
    filled = ((key, value) for key, value in row.items() if value is not None and value == value)
    return once([(key.lower().replace(" ", "_"), value) for key, value in filled])


def rows_of(path: str) -> Iterator[tuple[str, Any]]:
    """("line 3", the line as bytes) of JSON lines, ("row 3", the row) of other containers."""
    try:
        with open(path, "rb") as file:
            start = file.peek(8)[:8]
            if path.endswith(".parquet") or start.startswith(b"PAR1"):
                yield from parquet_rows(path, file)
                return
            packed = start.startswith(b"\x1f\x8b")
            yield from json_rows(path, gzip.GzipFile(fileobj=file) if packed else file)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


def json_rows(path: str, file) -> Iterator[tuple[str, Any]]:
    start = file.peek(64)
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"cannot read {path}: it is UTF-16 or UTF-32; save it as UTF-8")
    mark = b"\xef\xbb\xbf"  # the byte order mark of UTF-8
    if start.removeprefix(mark).lstrip().startswith(b"["):
        try:
            rows = DECODER.decode(file.read().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(f"{path}{line}: a JSON array, but {reason(error)}") from None
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE), b""), start=1):
        if len(line) == MAX_LINE:
            raise UserError(f"{path}, line {number}: a line has fewer than {MAX_LINE:,} bytes")
        line = line.removeprefix(mark) if number == 1 else line
        if line := line.strip():
            yield f"line {number}", line


def parquet_rows(path: str, file) -> Iterator[tuple[str, dict]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        how = "install it (pip install pyarrow) or convert the file to JSONL"
        raise UserError(f"{path}: reading parquet needs the package pyarrow; {how}") from None
    try:
        table = ParquetFile(file)
        once([(name, i) for i, name in enumerate(table.schema_arrow.names)])  # no column twice
        kinds = {"float": np.float32, "halffloat": np.float16}
        narrow = [(c.name, kinds[str(c.type)]) for c in table.schema_arrow if str(c.type) in kinds]
        rows = (row for batch in table.iter_batches(batch_size=1024) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            for name, kind in narrow:  # a number is 0.1, and not the double next to it
                row[name] = None if row[name] is None else float(str(kind(row[name])))
            yield f"row {number}", row
    except (OSError, ValueError, ArrowException) as error:
        raise UserError(f"cannot read {path}: {reason(error)}") from None


# ---- the hub ------------------------------------------------------------------------------


def local_files(name: str) -> list[str]:
    """The files that a name stands for: itself, or those of a hub data set, fetched if need be."""
    hub = HUB_ID.fullmatch(name)
    if os.path.exists(name) or not hub or DATA_FILE.search(name):
        return [name]
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

    repo, folder = {"repo_id": hub[1], "repo_type": "dataset"}, None
    try:
        try:
            there = [file.rfilename for file in HfApi().repo_info(**repo).siblings]
        except (OSError, HTTPError) as error:
            try:  # what the cache has; no pattern: what it lacks is no mistake yet
                folder = snapshot_download(**repo, local_files_only=True, allow_patterns=[])
            except OSError:
                raise error from None
            paths = (path for path in Path(folder).rglob("*") if path.is_file())
            there = [path.relative_to(folder).as_posix() for path in paths]
        chosen = choose(name, hub[1], hub[2] or "", there)
        folder = folder or snapshot_download(**repo, allow_patterns=chosen)
    except (OSError, ValueError, HTTPError) as error:
        unknown = isinstance(error, RepositoryNotFoundError)
        why = "the hub has none of that name that you may read" if unknown else reason(error)
        raise UserError(f"{name}: no such file, and no data set of the hub: {why}") from None
    return [str(Path(folder, file)) for file in chosen]


def choose(name: str, repo: str, wanted: str, there: list[str]) -> list[str]:
    """The files of the wanted config and split, told by their names, as uploads spell them:

    main/train-00000-of-00001.parquet, main/train/0000.parquet, data/train-00000-of-00002.parquet,
    nq/train.jsonl, train.json.gz. Part of a name will do where it fits one alone.
    """
    by_split: dict[str, list[str]] = {}  # "main/train" -> its files
    for file in sorted(there):
        if DATA_FILE.search(file) and not Path(file).name.startswith("dataset_info"):
            stem = re.sub(r"-\d+-of-\d+(-\w+)?$|/\d+$", "", DATA_FILE.sub("", file))
            by_split.setdefault(stem.removeprefix("data/"), []).append(file)
    if not by_split:
        raise UserError(f"{name}: that data set holds no .parquet, .jsonl or .json file")

    def words(text: str) -> set[str]:
        return set(re.findall(r"[^\W_]+", text.lower())) - {"default"}

    exact = [split for split in by_split if split == wanted]
    fitting = exact or [split for split in by_split if words(wanted) <= words(split)]
    if len(fitting) != 1:
        known = ", ".join(f"{repo}:{split}" for split in [*by_split][:20])
        raise UserError(f"{name}: name one of {known}{', ..' if len(by_split) > 20 else ''}")
    files = by_split[fitting[0]]
    files = [file for file in files if Path(file).suffix == Path(files[0]).suffix]  # not twice
    shards = re.search(r"-of-(\d+)", files[0])
    if shards and len(files) != int(shards[1]):
        raise UserError(f"{name}: only {len(files)} of its {int(shards[1])} files are there")
    return files


# ---- documents ----------------------------------------------------------------------------

TEXT_KEYS = ("text", "contents", "content", "page_content", "passage", "paragraph_text", "body")
DOCUMENT = '{"title": "...", "text": "..."} (or "contents", "content"; without title: only a text)'


class Document(NamedTuple):
    title: str  # "" where there is none
    text: str


def load_documents(path: str) -> list[Document]:
    """The documents of a file or hub data set, in its order; raises UserError."""
    documents = [document for _, document in read_rows(path, read_document, DOCUMENT)]
    if not documents:
        raise UserError(f"{path} holds no documents")
    return documents


def read_document(row: dict) -> Document:
    title = row.get("title") or ""
    there = [key for key in TEXT_KEYS if key in row]
    text = row[next((key for key in there if row[key]), there[0] if there else "text")]
    if isinstance(text, list):  # of paragraphs or sentences, or of both
        parts = (part if isinstance(part, list) else [part] for part in text)
        text = " ".join(sentence for part in parts for sentence in part)
    if not isinstance(title, str) or not isinstance(text, str):
        raise ValueError("title and text are texts")
    quoted = re.match(r'"(.+)"\r?\n', text)  # Search-R1's contents: "Title", a line end, the text
    if quoted and not title:
        return Document(quoted[1].replace('""', '"'), text[quoted.end() :])
    return Document(title, text)
