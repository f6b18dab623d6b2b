"""What a run leaves on the disk, and how it goes on from there. Nothing here is the algorithm.

    config.json                          the settings
    metrics.jsonl                        a line a step
    evaluations.jsonl, rollouts.jsonl    figures on the test questions; some trees
    checkpoints/step-000040/             all that a completed step leaves behind
    adapter/                             of the newest checkpoint, in PEFT's format
    lock                                 held by the process that writes here

A checkpoint counts if its checkpoint.json, written last, names the SHA-256 of every file in it.
What a step asks and draws follows from the seed and its number, so the number is the position in
the data, and no random state is kept. What was damaged is set aside (`.damaged`), and that is said.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import filelock
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Module

from app.config import Config
from app.page.read import LOGS, Line, lacks_figures, read_log
from app.screen import console
from data.files import UserError, local_files, reason

VERSION = "0.5"  # of arpo_mini; a change after which a step gives other numbers raises it
KEEP = 2  # checkpoints, the newest
# What a resumed run may change: none of it changes a step.
FREE = ("steps", "save_every", "eval_every", "eval_part", "output_dir")
# Where things are may change too; what is there may not, and is compared by its content.
PLACES = ("model_name", "dataset_path", "eval_path", "documents_path")
CHECKPOINT = (  # its files beside checkpoint.json
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "optimizer.safetensors",
    "state.json",
)
ALONE = SimpleNamespace(rank=0, count=1)
logger = logging.getLogger("arpo_mini")


class CannotWrite(UserError):
    """The disk is full or the folder read-only; what was saved before is intact."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which stop a run as Ctrl-C does."""


def terminate(signum: int, frame) -> None:
    raise Terminated


# ---- files --------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        words = f"cannot write to {folder}: {reason(error)}"
        raise CannotWrite(f"{words}; what was saved is intact, see train --resume") from None


def write(path: Path, data: bytes, mode: str = "wb") -> None:
    """Data that is on the disk itself when this returns."""
    with path.open(mode) as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def put(path: Path, data: bytes) -> None:
    """The whole file at once: a reader finds the old one or the new one."""
    beside = path.with_name(path.name + ".tmp")
    write(beside, data)
    beside.replace(path)


def sync_folder(path: Path) -> None:
    """Has the names in a folder written to the disk, where a system can: Windows opens none."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC):
            raise


def set_aside(path: Path) -> str:
    """Renames what was damaged, to a name that is free; returns that."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.damaged{number if number > 1 else ''}")
        if not os.path.lexists(aside):
            return path.rename(aside).name


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, default=sorted) + "\n").encode()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# ---- a checkpoint -------------------------------------------------------------------------


def checkpoint_files(model: Module, optimizer, others: dict) -> dict[str, bytes]:
    """A copy of all that a completed step leaves behind, as files.

    Made after every step, so that a run can be stopped in the middle of the next one, even of its
    optimizer step, and go on from here.
    """
    from peft import get_peft_model_state_dict  # late: engine silences what it says when imported

    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    adapter = get_peft_model_state_dict(model, trained, save_embedding_layers=False)
    peft_config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
    optimized = optimizer.state_dict()
    moments = {
        f"{index}.{name}": value
        for index, values in optimized["state"].items()
        for name, value in values.items()
    }
    contents = (
        to_json(peft_config),
        safetensors.torch.save(adapter, {"format": "pt"}),
        safetensors.torch.save(moments),
        to_json({**others, "param_groups": optimized["param_groups"]}),
    )
    return dict(zip(CHECKPOINT, contents, strict=True))


def read_checkpoint(path: Path) -> dict | None:
    """Its checkpoint.json; None if one of its files is not what was written."""
    try:
        about = json.loads((path / "checkpoint.json").read_bytes())
        whole = about["step"] == step_of(path) and isinstance(about["made_by"], dict)
        sums = {name: digest((path / name).read_bytes()) for name in CHECKPOINT}
        return {**about, "path": path} if whole and about["sha256"] == sums else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def restore(path: Path, optimizer) -> dict:
    """The optimizer, and returns the other things that the checkpoint keeps.

    The adapter is loaded with the model.
    """
    others = json.loads((path / "state.json").read_bytes())
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in safetensors.torch.load_file(path / "optimizer.safetensors").items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": others["param_groups"]})
    return others


# ---- what a checkpoint was made by --------------------------------------------------------


def made_by(config: Config) -> dict[str, Any]:
    """The settings, versions and data that a step's numbers depend on, by name."""
    settings = dataclasses.asdict(config)
    files = [name for name in PLACES if name.endswith("_path")]
    return {
        **{name: settings[name] for name in settings if name not in (*FREE, *PLACES)},
        "arpo_mini": VERSION,
        **{name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")},
        **{f"content of {name}": fingerprint_file(settings[name]) for name in files},
    }


def version(package: str) -> str | None:
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)


def fingerprint_file(path: str) -> str | None:
    with contextlib.suppress(OSError, UserError):  # with tools of one's own: no documents
        return digest(b"".join(Path(file).read_bytes() for file in local_files(path)))


def fingerprint_model(model: Module) -> str:
    """Of its architecture, and of some 256 values of every frozen parameter."""
    config = {**model.get_base_model().config.to_dict(), "_name_or_path": None}
    found = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, p in model.named_parameters():
        if not p.requires_grad:
            some = p.detach().flatten()[:: max(1, p.numel() // 256)].contiguous()
            found.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
            found.update(some.view(torch.uint8).cpu().numpy().tobytes())
    return found.hexdigest()


def refuse_difference(checkpoint: dict, now: dict[str, Any]) -> None:
    """UserError if the checkpoint is of other settings, another version, model or data."""
    saved = checkpoint["made_by"]

    def brief(value: Any) -> str:
        return f"{value[:12]}.." if isinstance(value, str) and len(value) == 64 else str(value)

    different = [
        f"{name} is {brief(saved.get(name))} there and {brief(value)} here"
        for name, value in now.items()
        if saved.get(name) != value
    ]
    if different:
        raise UserError(
            f"cannot go on from {checkpoint['path']}: {'; '.join(different)} "
            f"(a new run can begin with --adapter {checkpoint['path'] / 'adapter'})"
        )


# ---- which folder -------------------------------------------------------------------------


def new_folder(wanted: str) -> Path:
    """The folder itself, or its name with the first free number: no run overwrites another."""
    try:
        first = Path(wanted).resolve()
        if Path(wanted).name in ("", ".."):  # also of ".", "/"
            raise ValueError("it must name a folder of the run's own")
        for number in itertools.count(1):
            folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir(parents=True)
                return folder
    except (OSError, ValueError, RuntimeError) as error:  # the last: links in a circle
        raise UserError(f"--output_dir {wanted}: {reason(error)}") from None


def newest_run(output_dir: str) -> Path:
    """Of the runs that were begun with this output_dir, the one that was started last."""
    first = Path(output_dir).resolve()
    named = re.compile(re.escape(first.name) + r"(-\d+)?")
    runs = [path.parent for path in first.parent.glob("*/config.json")]
    runs = [folder for folder in runs if named.fullmatch(folder.name)]
    if not runs:
        raise UserError(f"--resume: there is no run in {output_dir}; name its folder")
    return max(runs, key=lambda folder: (folder / "config.json").stat().st_mtime_ns)


def resumed(values: dict) -> dict:
    """The settings of the run to go on with, and over them what was typed."""
    if values["resume"] is not True and "output_dir" in values:
        raise UserError(f"--resume {values['resume']}: leave --output_dir out, or name no folder")
    runs = values.get("output_dir", Config.output_dir)
    folder = newest_run(runs) if values["resume"] is True else Path(values["resume"]).resolve()
    try:
        settings = json.loads((folder / "config.json").read_bytes())
        unknown = settings.keys() - {item.name for item in dataclasses.fields(Config)}
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise UserError(f"--resume {folder} is not a run: config.json: {reason(error)}") from None
    if unknown:
        raise UserError(
            f"--resume {folder}: it is not of version {VERSION}, which does not have the settings "
            f"{', '.join(sorted(unknown))} (a new run can begin with --adapter {folder}/adapter)"
        )
    return {**settings, **values, "resume": folder}


# ---- the folder ---------------------------------------------------------------------------


class RunFolder:
    """The folder of a run, held by this process until the end of its `with` block.

    The block ends with a checkpoint of the last completed step, whatever ends it: the last step,
    Ctrl-C, SIGTERM or an error. A second signal does not wait for that.
    """

    def __init__(self, config: Config, folder: Path | None = None, processes=ALONE):
        """A new run or the one in `folder`; `start` writes. Of several processes the first does."""
        self.config, self.folder = config, folder and Path(folder).resolve()
        self.processes, self.writes, self.checkpoint = processes, processes.rank == 0, None
        if processes.count > config.questions_per_step:
            words = f"each of {processes.count} processes needs a question"
            raise UserError(f"--questions_per_step {config.questions_per_step}: {words}")
        self.made_by = made_by(config) | {"processes": processes.count}
        console.quiet = console.quiet or not self.writes
        self.done: tuple[int, dict] | None = None  # the last completed step, and its files
        self.scores: list[list[float]] = []  # of the last steps' tool results
        self.logs: dict[str, list[Line]] = {name: [] for name in LOGS}
        self.metrics: list[dict] = []
        self.evaluations: list[dict] = []
        self.lock, self.old_handlers = None, {}

    @property
    def step(self) -> int:
        """The last completed step."""
        return self.done[0] if self.done else 0

    @property
    def adapter(self) -> str | None:
        """Where the adapter that this run goes on with is; None for a fresh one."""
        return str(self.checkpoint["path"] / "adapter") if self.checkpoint else self.config.adapter

    def __enter__(self) -> RunFolder:
        # Only the main thread gets signals, and not every system has these; nohup ignores one.
        if threading.current_thread() is threading.main_thread():
            both = (getattr(signal, name, None) for name in ("SIGTERM", "SIGHUP"))
            both = (n for n in both if n and signal.getsignal(n) not in (None, signal.SIG_IGN))
            self.old_handlers = {n: signal.signal(n, terminate) for n in both}
        try:
            if self.folder:  # what is in it changes in `start`, when all is checked
                self.hold() if self.writes else None
                self.logs = {n: read_log(self.folder / n, lacks_figures) for n in LOGS}
                self.checkpoint = self.choose_checkpoint()
            if self.checkpoint:
                refuse_difference(self.checkpoint, self.made_by)
                steps, made = self.config.steps, self.checkpoint["step"]
                if steps < made:
                    raise UserError(f"--steps {steps}: the run has made {made} steps already")
        except BaseException:
            self.let_go()
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error and self.done and not isinstance(error, CannotWrite):
                for number in (signal.SIGINT, signal.SIGTERM) if self.processes.count > 1 else ():
                    signal.signal(number, signal.SIG_IGN)  # who launched them sends one more
                self.save()
                named = f'"{self.folder}"' if " " in str(self.folder) else self.folder
                logger.info(f"step {self.step} is saved; go on with: train --resume {named}")
        finally:
            self.let_go()

    def hold(self) -> None:
        self.lock = filelock.FileLock(self.folder / "lock")
        with writing(self.folder):
            try:
                self.lock.acquire(timeout=0)
            except filelock.Timeout:
                raise UserError(f"{self.folder} is in use by another process") from None

    def let_go(self) -> None:
        if self.lock:
            self.lock.release()
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)

    # ---- how it begins, or goes on ----

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        found = (self.folder / "checkpoints").glob("step-" + "[0-9]" * 6)
        return sorted(found, reverse=True)

    def choose_checkpoint(self) -> dict | None:
        """The newest whole one; an older one where the logs end before that, if there is one."""
        # One without checkpoint.json was being written when the process was killed.
        found = [path for path in self.checkpoints() if (path / "checkpoint.json").exists()]
        whole = [each for each in map(read_checkpoint, found) if each]
        logged = [line.row["step"] for line in self.logs["metrics.jsonl"] if line.row]
        if not whole and (found or logged):
            words = "none of its checkpoints is whole" if found else "its checkpoints are gone"
            raise UserError(f"{self.folder}: {words}")
        lines = itertools.chain(*self.logs.values())
        cut_short = [line.cut_short for line in lines if line.cut_short is not None]
        until = min([max(logged, default=0), *(step - 1 for step in cut_short)])
        older = [each for each in whole if each["step"] <= until]
        return next(iter(older + whole), None)  # None: it was stopped before the first one

    def start(self, model: Module, optimizer, scaler, limits, prompt: list[int]) -> None:
        """Make the folder, or restore what the checkpoint has of optimizer, `scaler` and `limits`.

        `limits`, a dataclass, is kept with every checkpoint: what is computed at once. `prompt` are
        the token ids of any question, which change with the system prompt and the tools.
        """
        self.model, self.optimizer, self.scaler, self.limits = model, optimizer, scaler, limits
        self.made_by |= {
            "device": model.device.type,
            "weights of model_name": fingerprint_model(model),
            "prompt and tools": digest(json.dumps(prompt).encode()),
        }
        done, self.seconds_before, self.started = 0, 0.0, time.perf_counter()
        if self.checkpoint:
            refuse_difference(self.checkpoint, self.made_by)
            others = restore(self.checkpoint["path"], optimizer)
            done, self.seconds_before = self.checkpoint["step"], others["seconds"]
            vars(limits).update(others["limits"])
            self.scores = others["scores"]
            scaler.load_state_dict(others["scaler"])
        if self.processes.count > 1:  # and none writes before all have read
            said = self.processes.exchange((done, self.made_by))
            alike = {json.dumps(each, default=str) for each in said}
            if len(alike) > 1:
                raise UserError("the processes of this run differ in settings, versions or data")
        if not self.writes:
            logged = [line.row for line in self.logs[LOGS[1]] if line.row]
            self.evaluations, self.done = [x for x in logged if x["step"] <= done], (done, {})
            return
        if self.folder is None:
            self.folder = new_folder(self.config.output_dir)
            self.hold()
            logger.info(f"writing to {self.folder}")
        else:
            logger.info(f"going on after step {done} in {self.folder}")
        with writing(self.folder):
            for path in self.checkpoints():
                killed = path.is_dir() and not (path / "checkpoint.json").exists()
                if step_of(path) > done and killed:  # while it was written
                    shutil.rmtree(path)
                elif step_of(path) > done:
                    logger.info(f"a checkpoint is not used and set aside: {set_aside(path)}")
            put(self.folder / "config.json", to_json(dataclasses.asdict(self.config)))
            self.metrics, self.evaluations, _ = [self.cut_log(name, done) for name in LOGS]
        lost = sorted(set(range(1, done + 1)) - {row["step"] for row in self.metrics})
        if lost:
            logger.info(f"metrics.jsonl has no line of {len(lost)} steps, the first is {lost[0]}")
        self.remember(done)
        self.save()

    def cut_log(self, name: str, done: int) -> list[dict]:
        """The rows up to step `done`, which stay. What cannot be read goes, and is said."""
        lines, path = self.logs[name], self.folder / name
        kept = [line for line in lines if line.row and line.row["step"] <= done]
        in_order = sorted(kept, key=lambda line: line.row["step"])
        if in_order != kept:
            logger.info(f"the lines of {name} were not in the order of their steps; now they are")
            kept = in_order
        # A last line cut short is what a killed process leaves; a later step is made again.
        damaged = [x for x in lines if not x.row and (x.cut_short is None or x.cut_short <= done)]
        if damaged:
            where = f"{name}, line {damaged[0].number}: {damaged[0].wrong}"
            more = f", and {len(damaged) - 1} more lines" if len(damaged) > 1 else ""
            logger.info(f"{where}{more}; left out here and kept in {set_aside(path)}")
        if kept != lines:
            put(path, b"".join(line.text + b"\n" for line in kept))
        return [line.row for line in kept]

    # ---- while it runs ----

    def append(self, name: str, row: dict) -> None:
        """A line to one of the logs; every line names its step."""
        if not self.writes:
            return
        with writing(self.folder), (self.folder / name).open("ab") as file:
            file.write(json.dumps(row).encode() + b"\n")

    def log(self, metrics: dict) -> None:
        self.append("metrics.jsonl", metrics)
        self.metrics.append(metrics)

    def log_evaluation(self, figures: dict) -> None:
        self.append("evaluations.jsonl", figures)
        self.evaluations.append(figures)

    def evaluated(self, **facts) -> dict | None:
        """The figures of an evaluation that was made already, found by what they say of it."""
        return next((e for e in self.evaluations if facts.items() <= e.items()), None)

    def complete(self, step: int) -> None:
        """The step is done and logged: from here on the run can go on after it."""
        self.remember(step)
        if step % self.config.save_every == 0 or step == self.config.steps:
            self.save()

    def remember(self, step: int) -> None:
        others = {"seconds": self.seconds(), "limits": dataclasses.asdict(self.limits)}
        others |= {"scores": self.scores, "scaler": self.scaler.state_dict()}
        files = checkpoint_files(self.model, self.optimizer, others) if self.writes else {}
        self.done = step, files

    def save(self) -> None:
        """A checkpoint of the last completed step, its adapter in adapter/, old ones pruned."""
        step, files = self.done
        if not self.writes:
            return
        path = self.folder / "checkpoints" / f"step-{step:06d}"
        with writing(self.folder):
            (self.folder / "config.json").stat()  # else it was moved away: no other one begins
            for folder in (path / "adapter", self.folder / "adapter"):
                folder.mkdir(parents=True, exist_ok=True)
            if not (path / "checkpoint.json").exists():
                for log in filter(Path.exists, (self.folder / name for name in LOGS)):
                    write(log, b"", "ab")  # no line of its steps may be lost after it
                for name, data in files.items():
                    write(path / name, data)
                sums = {name: digest(data) for name, data in files.items()}
                about = {"step": step, "made_by": self.made_by, "sha256": sums}
                put(path / "checkpoint.json", to_json(about))
            for name, data in files.items():
                if name.startswith("adapter/"):
                    put(self.folder / name, data)
            for folder in (path / "adapter", path, path.parent, self.folder):
                sync_folder(folder)
            for old in self.checkpoints()[KEEP:]:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()

    def seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def in_words(self) -> str:
        prefill, reread, train, unpacked = (
            sum(m[name] for m in self.metrics)
            for name in ("prefill_tokens", "reread_tokens", "train_tokens", "train_tokens_unpacked")
        )
        return (
            f"{self.seconds():.0f} seconds. Read {prefill:,} tokens of prompts and results; "
            f"reading the prefix again every turn: {reread / max(1, prefill):.1f} times as many.\n"
            f"Trained on {train:,} tokens; all trajectories, a row each, have {unpacked:,}.\n"
            f"Adapter, metrics and rollouts: {self.folder}"
        )
