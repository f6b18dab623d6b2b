"""What the commands of this folder share: flags in, an exit code out."""

import copy
import dataclasses
import signal
import tempfile
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

import engine  # noqa: F401  first: it silences what libraries say at their import
from app import cli
from app.config import Config, check
from app.run_folder import terminate
from app.screen import print_table
from data.files import UserError, reason

TRAIN = {item.name for item in dataclasses.fields(Config)}  # the flags of `train`


def parse(
    prog: str, text: str, args: list[str], own: type, names: Container[str] = TRAIN, **defaults
) -> tuple[Any, dict]:
    """A command's own settings, checked, and what was typed of those of Config in `names`.

    `own` is a dataclass of fields like Config's; `defaults` are other ones for fields of Config.
    """
    parser = cli.Parser(prog=prog, description=text.split("\n\n")[0], allow_abbrev=False)
    mine = dataclasses.fields(own)
    for item in [*mine, *(item for item in dataclasses.fields(Config) if item.name in names)]:
        shown = copy.copy(item)
        shown.default = defaults.get(item.name, item.default)
        parser.add_field(shown)
    values = parser.parse(args)
    settings = own(**{item.name: values.pop(item.name) for item in mine if item.name in values})
    check(settings)
    return settings, {**defaults, **values}


def make_folder(path: str | Path) -> Path:
    """The folder of --output_dir, there or new."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()  # else it is said after the work
    except OSError as error:
        raise UserError(f"--output_dir {path}: {reason(error)}") from None
    return Path(path)


def print_rows(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(*heads, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    print_table(table)


def exit_code(work: Callable[[], int | None]) -> int:
    """As of `arpo_mini.py`; SIGTERM ends every command here as Ctrl-C does."""
    # A script's `&` has SIGINT ignored, here and in all children.
    handlers = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: terminate}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        return cli.exit_code(work)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
