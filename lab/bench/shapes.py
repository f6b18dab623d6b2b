"""The shapes of models without their weights: the Qwen3 family ships, a folder has its own."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig, Qwen3Config

from app.screen import UserError

PUBLISHED = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
NAMES = [name for name in PUBLISHED if "/" in name]
SHORT = {name.partition("/")[2].lower(): name for name in NAMES}  # qwen3-4b -> Qwen/Qwen3-4B


def model_config(name: str, flag: str = "--model_name") -> PretrainedConfig:
    """The configuration of a published shape (either spelling), or of a folder with config.json.

    Nothing is downloaded. Raises UserError, naming the legal ones, for any other name.
    """
    published = SHORT.get(name.lower(), name)
    if published in NAMES:
        return Qwen3Config(**PUBLISHED["common"], **PUBLISHED[published])
    if not (Path(name) / "config.json").is_file():
        legal = ", ".join(NAMES)
        raise UserError(f"{flag} {name}: choose one of {legal}, or a folder with config.json")
    try:
        return AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag} {name}: {str(error).splitlines()[0]}") from None
