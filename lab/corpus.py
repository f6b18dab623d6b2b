"""A corpus to search, from the contexts of a data set: every paragraph once, whatever asks for it.

A row's paragraphs are read from
    context: {"title": [..], "sentences": [[..], ..]}     HotpotQA on the hub ("content": 2Wiki)
    context: [[title, [sentence, ..]], ..]                HotpotQA's own files; as JSON text: 2Wiki
    paragraphs: [{"title": .., "paragraph_text": ..}]     MuSiQue; also as context, or with "text"
    context: "..", and title if there is one              SQuAD
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from app.cli import refuse_unwritable, write_text
from app.config import option
from app.screen import say
from data.files import TEXT_KEYS, UserError, read_rows
from data.formats import as_list, from_json
from lab.command import exit_code, parse

LEGAL = '{"context": {"title": [".."], "sentences": [[".."]]}}, or see lab.corpus --help'


@dataclass(frozen=True)
class Flags:
    data: str = option("", "file or hub data set with contexts; several with commas between")
    output: str = option("documents.jsonl", "file to write, for --documents_path")
    rows: int = option(10**9, "rows to read of each at most", 1, 10**9)


def text_of(paragraph: dict) -> Any:
    return paragraph[next((key for key in ("sentences", *TEXT_KEYS) if key in paragraph), "text")]


def paragraphs(row: dict) -> list[tuple[str, str]]:
    """(title, text) of each paragraph of a row of any of the forms."""
    context = row["paragraphs"] if "paragraphs" in row else from_json(row["context"])
    if isinstance(context, str):
        context = {"title": row.get("title"), "text": context}
    if isinstance(context, dict) and isinstance(titles := context.get("title"), list):
        context = [*zip_longest(titles, as_list(text_of(context)))]
    found = []
    for each in as_list(context):
        match each:
            case dict():
                title, text = each.get("title") or "", text_of(each)
            case [title, text]:
                pass
            case _:
                raise ValueError("a paragraph has a title and a text")
        parts = as_list(text)
        if not all(isinstance(part, str) for part in [title, *parts]):
            raise ValueError("title and text are texts")
        found.append((title, " ".join(map(str.strip, parts))))
    return found


def make(args: list[str]) -> None:
    flags, _ = parse("python -m lab.corpus", __doc__, args, Flags, names=())
    if not flags.data:
        raise UserError("--data is missing: a file or hub data set with contexts")
    names, output = flags.data.split(","), Path(flags.output)
    if output.exists() and any(Path(x).exists() and output.samefile(x) for x in names):
        raise UserError(f"--output {output}: it is a file of --data; choose another")
    refuse_unwritable("--output", flags.output)
    sets = [islice(read_rows(name, paragraphs, LEGAL), flags.rows) for name in names]
    once = dict.fromkeys(pair for rows in sets for _, found in rows for pair in found if pair[1])
    if not once:
        raise UserError(f"--data {flags.data}: no paragraph in it; legal: {LEGAL}")
    lines = (json.dumps({"title": title, "text": text}) + "\n" for title, text in once)
    write_text("--output", flags.output, "".join(lines))
    say(f"{flags.output}: {len(once):,} documents")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: make(sys.argv[1:])))
