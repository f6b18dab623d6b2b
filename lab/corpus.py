"""A corpus to search, from the contexts of a data set: every paragraph once, whatever asks for it.

A row's paragraphs are read from
    context: {"title": [..], "sentences": [[..], ..]}     HotpotQA on the hub ("content": 2Wiki)
    context: [[title, [sentence, ..]], ..]                HotpotQA's own files
    paragraphs: [{"title": .., "paragraph_text": ..}]     MuSiQue
    context: "..", and title if there is one              SQuAD
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import islice

from app.cli import refuse_unwritable, write_text
from app.config import option
from app.screen import say
from data.files import UserError, read_rows
from lab.command import exit_code, parse

LEGAL = '{"context": {"title": [".."], "sentences": [[".."]]}}, or see lab.corpus --help'


@dataclass(frozen=True)
class Flags:
    data: str = option("", "file or hub data set with contexts; several with commas between")
    output: str = option("documents.jsonl", "file to write, for --documents_path")
    rows: int = option(10**9, "rows to read of each at most", 1, 10**9)


def paragraphs(row: dict) -> list[tuple[str, str]]:
    """(title, text) of each paragraph of a row of any of the forms."""
    if "paragraphs" in row:
        context = [(each.get("title") or "", each["paragraph_text"]) for each in row["paragraphs"]]
    elif isinstance(context := row["context"], str):
        context = [(row.get("title") or "", context)]
    elif isinstance(context, dict):
        texts = context["sentences" if "sentences" in context else "content"]
        context = zip(context["title"], texts, strict=True)
    found = []
    for title, text in context:
        if not isinstance(title, str) or isinstance(text, dict):
            raise ValueError("title and text are texts")
        found.append((title, " ".join(map(str.strip, [text] if isinstance(text, str) else text))))
    return found


def make(args: list[str]) -> None:
    flags, _ = parse("python -m lab.corpus", __doc__, args, Flags, names=())
    if not flags.data:
        raise UserError("--data is missing: a file or hub data set with contexts")
    refuse_unwritable("--output", flags.output)
    sets = [islice(read_rows(x, paragraphs, LEGAL), flags.rows) for x in flags.data.split(",")]
    once = dict.fromkeys(pair for rows in sets for _, found in rows for pair in found if pair[1])
    lines = (json.dumps({"title": title, "text": text}) + "\n" for title, text in once)
    write_text("--output", flags.output, "".join(lines))
    say(f"{flags.output}: {len(once):,} documents")


if __name__ == "__main__":
    sys.exit(exit_code(lambda: make(sys.argv[1:])))
