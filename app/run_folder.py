"""What a run leaves on the disk, and how it goes on from there. Nothing here is the algorithm.

    config.json                          the settings
    metrics.jsonl                        a line a step
    evaluations.jsonl, rollouts.jsonl    figures on the test questions; some trees
    checkpoints/step-000040/             all that a completed step leaves behind
    adapter/                             of the newest checkpoint, in PEFT's format
    lock                                 held by the process that writes here

A checkpoint is whole or absent: written to a folder beside, synced, then renamed. What a step asks
and draws follows from the seed and its number, so the number is the position in the data.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from app.screen import console
from data.files import UserError

VERSION = "0.3"  # of arpo_mini; a change after which a step gives other numbers raises it
LOGS = ("metrics.jsonl", "evaluations.jsonl", "rollouts.jsonl")
# What a resumed run may change: none of it changes a step.
FREE = ("steps", "save_every", "keep", "eval_every", "eval_part", "record_every", "output_dir")
# Where things are may change too; what is there may not, and is compared by its content.
PLACES = ("model_name", "dataset_path", "eval_path", "documents_path")


class CannotWrite(UserError):
    """The disk is full or the folder read-only; what was saved before is intact."""


class NonFinite(FloatingPointError):
    """A number is inf or nan. `rows` are the token rows it happened in, `tensors` what shows it."""

    def __init__(self, words: str, rows: list, tensors: dict[str, Tensor]):
        super().__init__(words)
        self.rows, self.tensors = rows, tensors


class Terminated(KeyboardInterrupt):
    """SIGTERM, which stops a run as Ctrl-C does."""


# ---- files --------------------------------------------------------------------------------


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        words = f"cannot write to {folder}: {error.strerror or error}"
        raise CannotWrite(f"{words}; what was saved is intact, see train --resume") from None


def sync(path: Path) -> None:
    """Has a file, or the names in a folder, written to the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    sync(path)


def put(path: Path, data: bytes) -> None:
    """The whole file at once: a reader finds the old one or the new one."""
    beside = path.with_name(path.name + ".tmp")
    write(beside, data)
    beside.replace(path)


def put_folder(path: Path, files: dict[str, bytes]) -> None:
    """A new folder with these files (by their relative names), whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    try:
        for name, data in files.items():
            (beside / name).parent.mkdir(parents=True, exist_ok=True)
            write(beside / name, data)
        for folder in {(beside / name).parent for name in files} | {beside}:
            sync(folder)
        beside.rename(path)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync(path.parent)


def to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, default=sorted) + "\n").encode()


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def cut(path: Path, step: int) -> list[dict]:
    """Takes away the lines after those of `step`, and one that was torn; returns what stays."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    rows = []
    for line in lines:
        try:
            row = json.loads(line) if line.endswith(b"\n") else None
        except ValueError:
            row = None
        if row is None or row["step"] > step:
            break
        rows.append(row)
    if len(rows) < len(lines):
        put(path, b"".join(lines[: len(rows)]))
    return rows


# ---- the state of a run -------------------------------------------------------------------


def random_states() -> dict:
    """Of every generator that the policy, the tools or the libraries may draw from."""
    return {
        "python": random.getstate(),
        "numpy": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "cuda": [state.tolist() for state in torch.cuda.get_rng_state_all()],
    }


def set_random_states(states: dict) -> None:
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    np.random.set_state(states["numpy"])
    torch.set_rng_state(torch.tensor(states["torch"], dtype=torch.uint8))
    for device, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(torch.tensor(state, dtype=torch.uint8), device)


@dataclass(frozen=True)
class State:
    """A copy, on the CPU, of all that a completed step leaves behind.

    Taken after every step, so that a run can be stopped in the middle of the next one, even of its
    optimizer step, and go on from here.
    """

    step: int
    seconds: float  # that the run took to here
    adapter: dict[str, Tensor]  # the trainable parameters, by name
    moments: dict[str, Tensor]  # of the optimizer: "INDEX.NAME"
    param_groups: list[dict]  # of the optimizer
    randomness: dict
    chunks: dict  # how much is computed at once: less, after the memory ran out

    @classmethod
    def of(cls, step: int, seconds: float, model: PeftModel, optimizer, chunks) -> State:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        optimized = optimizer.state_dict()
        moments = {
            f"{index}.{name}": value
            for index, values in optimized["state"].items()
            for name, value in values.items()
        }
        adapter, moments = (
            {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
            for tensors in (trained, moments)
        )
        return cls(
            step=step,
            seconds=seconds,
            adapter=adapter,
            moments=moments,
            param_groups=optimized["param_groups"],
            randomness=random_states(),
            chunks=dataclasses.asdict(chunks),
        )

    def files(self, model: PeftModel, made_by: dict) -> dict[str, bytes]:
        """A checkpoint, as the files of its folder."""
        adapter = get_peft_model_state_dict(model, self.adapter, save_embedding_layers=False)
        peft_config = {**model.peft_config["default"].to_dict(), "inference_mode": True}
        files = {
            "adapter/adapter_config.json": to_json(peft_config),
            "adapter/adapter_model.safetensors": safetensors.torch.save(adapter, {"format": "pt"}),
            "optimizer.safetensors": safetensors.torch.save(self.moments),
            "random.json": json.dumps(self.randomness).encode(),
        }
        about = {
            "step": self.step,
            "seconds": self.seconds,
            "param_groups": self.param_groups,
            "chunks": self.chunks,
            "made_by": made_by,
            "sha256": {name: digest(data) for name, data in files.items()},
        }
        return {**files, "checkpoint.json": to_json(about)}


def read_checkpoint(path: Path) -> dict | None:
    """Its checkpoint.json; None if one of its files is not what was written."""
    try:
        about = json.loads((path / "checkpoint.json").read_bytes())
        for name, expected in about["sha256"].items():
            if digest((path / name).read_bytes()) != expected:
                return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return {**about, "path": path}


def restore(optimizer, checkpoint: dict) -> None:
    """The optimizer and the random states. (The adapter is loaded with the model.)"""
    state: dict[int, dict[str, Tensor]] = {}
    saved = safetensors.torch.load_file(checkpoint["path"] / "optimizer.safetensors")
    for key, value in saved.items():
        index, name = key.split(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": checkpoint["param_groups"]})
    set_random_states(json.loads((checkpoint["path"] / "random.json").read_bytes()))


# ---- what a checkpoint was made by --------------------------------------------------------


def made_by(config) -> dict[str, Any]:
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
    with contextlib.suppress(OSError):  # who brings tools of his own may have no documents
        return digest(Path(path).read_bytes())


def fingerprint_model(model: PeftModel) -> str:
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


# ---- the folder ---------------------------------------------------------------------------


def new_folder(wanted: str) -> Path:
    """The folder itself, or its name with the first free number: no run overwrites another."""
    first = Path(wanted).resolve()
    for number in itertools.count(1):
        folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"--output_dir {wanted}: {error.strerror}") from None


def newest_run(output_dir: str) -> Path:
    """Of the runs that were begun with this output_dir, the one that was written to last."""
    first = Path(output_dir).resolve()
    named = re.compile(re.escape(first.name) + r"(-\d+)?")
    runs = [folder for folder in first.parent.glob("*") if named.fullmatch(folder.name)]
    runs = [folder for folder in runs if (folder / "lock").exists()]
    if not runs:
        raise UserError(f"--resume: there is no run in {output_dir}; name its folder")
    return max(runs, key=lambda folder: (folder / "lock").stat().st_mtime_ns)


def saved_settings(folder: Path) -> dict[str, Any]:
    """config.json of a run."""
    path = folder / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        words = getattr(error, "strerror", None) or error
        raise UserError(f"--resume {folder}: it is not a run: {path.name}: {words}") from None
    if not isinstance(settings, dict):
        raise UserError(f"--resume {folder}: it is not a run: {path.name} holds no settings")
    return settings


def resumed(values: dict, Config: type) -> dict:
    """The settings of the run to go on with, and over them what was typed."""
    if values["resume"] and "output_dir" in values:
        raise UserError(f"--resume {values['resume']}: leave --output_dir out, or name no folder")
    if values["resume"]:
        folder = Path(values["resume"]).resolve()
    else:
        folder = newest_run(values.get("output_dir", Config.output_dir))
    settings = saved_settings(folder)
    unknown = settings.keys() - {item.name for item in dataclasses.fields(Config)}
    if unknown:
        names = ", ".join(sorted(unknown))
        raise UserError(f"--resume {folder}: settings of another version: {names}")
    return {**settings, **values, "resume": folder}


class RunFolder:
    """The folder of a run, held by this process until the end of its `with` block.

    The block ends with a checkpoint of the last completed step, whatever ends it: the last step,
    Ctrl-C, SIGTERM or an error. A second signal does not wait for that.
    """

    def __init__(self, config, folder: Path | None = None):
        """A new run, which touches the disk in `start`, or the run in `folder`, to go on with."""
        self.config, self.folder = config, folder and Path(folder).resolve()
        self.made_by, self.checkpoint = made_by(config), None
        self.state: State | None = None
        self.metrics: list[dict] = []
        self.evaluations: list[dict] = []
        self.lock = None

    def __enter__(self) -> RunFolder:
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        if self.in_main_thread:  # the only one that gets signals
            self.old_handler = signal.signal(signal.SIGTERM, terminate)
        try:
            if self.folder:
                self.hold()
                self.checkpoint = self.newest_checkpoint()
                if self.checkpoint:
                    refuse_difference(self.checkpoint, self.made_by)
                    self.refuse_fewer_steps()
        except BaseException:
            self.let_go()
            raise
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if error and self.state and not isinstance(error, CannotWrite):
                self.save()
                self.say(f"step {self.step} is saved; go on with: train --resume {self.folder}")
        finally:
            self.let_go()

    def hold(self) -> None:
        with writing(self.folder):
            self.lock = (self.folder / "lock").open("a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            owner = self.lock.read().strip()
            raise UserError(f"{self.folder} is in use by process {owner}") from None
        with writing(self.folder):
            self.lock.truncate(0)
            self.lock.write(f"{os.getpid()}\n")
            self.lock.flush()

    def let_go(self) -> None:
        if self.lock:
            self.lock.close()
        if self.in_main_thread:
            signal.signal(signal.SIGTERM, self.old_handler)

    @property
    def step(self) -> int:
        """The last completed step."""
        return self.state.step if self.state else 0

    @property
    def adapter(self) -> str | None:
        """Where the adapter that this run goes on with is; None for a fresh one."""
        return str(self.checkpoint["path"] / "adapter") if self.checkpoint else self.config.adapter

    def start(self, model: PeftModel, optimizer, chunks, prompt: list[int]) -> None:
        """Make the folder, or restore what the checkpoint has of these and the random states."""
        self.model, self.optimizer, self.chunks = model, optimizer, chunks
        self.made_by |= {
            "device": model.device.type,
            "weights of model_name": fingerprint_model(model),
            "prompt and tools": digest(json.dumps(prompt).encode()),
        }
        done, self.seconds_before, self.started = 0, 0.0, time.perf_counter()
        if self.checkpoint:
            refuse_difference(self.checkpoint, self.made_by)
            done, self.seconds_before = self.checkpoint["step"], self.checkpoint["seconds"]
            restore(optimizer, self.checkpoint)
            vars(chunks).update(self.checkpoint["chunks"])
        if self.folder is None:
            self.folder = new_folder(self.config.output_dir)
            self.hold()
            self.say(f"writing to {self.folder}")
        else:
            self.say(f"going on after step {done} in {self.folder}")
        with writing(self.folder):
            put(self.folder / "config.json", to_json(dataclasses.asdict(self.config)))
            self.metrics, self.evaluations, _ = [cut(self.folder / name, done) for name in LOGS]
        if len(self.metrics) != done:
            found = f"{len(self.metrics)} lines for the {done} steps of {self.checkpoint['path']}"
            raise UserError(f"{self.folder / LOGS[0]} has {found}")
        self.remember(done)
        self.save()

    def refuse_fewer_steps(self) -> None:
        done = self.checkpoint["step"]
        if self.config.steps < done:
            raise UserError(f"--steps {self.config.steps}: the run has made {done} steps already")

    def say(self, words: str) -> None:
        console.print(words, markup=False, soft_wrap=True)

    def append(self, name: str, row: dict) -> None:
        """A line to one of the logs; every line names its step."""
        with writing(self.folder), (self.folder / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

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
        self.state = State.of(step, self.seconds(), self.model, self.optimizer, self.chunks)

    def save(self) -> None:
        """A checkpoint of the last completed step, its adapter in adapter/, old ones pruned."""
        path = self.folder / "checkpoints" / f"step-{self.step:06d}"
        with writing(self.folder):
            for folder in (path.parent, self.folder / "adapter"):
                folder.mkdir(exist_ok=True)
            sync(self.folder)
            if not path.exists():
                for name in filter(Path.exists, (self.folder / name for name in LOGS)):
                    sync(name)  # no line of its steps may be lost after it
                put_folder(path, self.state.files(self.model, self.made_by))
            for file in (path / "adapter").iterdir():
                put(self.folder / "adapter" / file.name, file.read_bytes())
            for old in self.checkpoints()[self.config.keep :]:
                shutil.rmtree(old.rename(old.with_suffix(".tmp")))

    def checkpoints(self) -> list[Path]:
        """Newest first."""
        found = (self.folder / "checkpoints").glob("step-" + "[0-9]" * 6)
        return sorted(found, reverse=True)

    def newest_checkpoint(self) -> dict | None:
        """The newest whole one; one that is not is put aside, what was half written removed."""
        with writing(self.folder):
            for pattern in ("*.tmp", "adapter/*.tmp", "checkpoints/*.tmp"):
                for left in self.folder.glob(pattern):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()
            broken = []
            for path in self.checkpoints():
                found = read_checkpoint(path)
                if found:
                    break
                broken.append(path)
            else:
                if broken:
                    raise UserError(f"{self.folder}: none of its checkpoints is whole")
                return None  # it was stopped before the first one
            for path in broken:
                aside = path.with_suffix(".broken")
                shutil.rmtree(aside, ignore_errors=True)
                self.say(f"a checkpoint is not whole and not used: {path.rename(aside)}")
        return found

    def keep_evidence(self, name: str, tensors: dict[str, Tensor], facts: dict) -> Path:
        """A folder beside the checkpoints with what somebody should look at."""
        path = self.folder / name
        tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        with writing(self.folder):
            shutil.rmtree(path, ignore_errors=True)
            files = {"tensors.safetensors": safetensors.torch.save(tensors)}
            put_folder(path, {**files, "facts.json": to_json(facts)})
        return path

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
            f"Trained on {train:,} tokens; every trajectory as a row of its own: "
            f"{unpacked / max(1, train):.1f} times as many.\n"
            f"Adapter, metrics and rollouts: {self.folder}"
        )


@contextlib.contextmanager
def watched(run: RunFolder, policy, questions: list, step: int) -> Iterator[None]:
    """A number that goes wrong is saved with what it happened on, and ends the run in one line."""
    try:
        yield
    except NonFinite as wrong:
        prompts = {tuple(policy.prompt(question.text)): question.text for question in questions}
        rows = [
            {"question": text, "tokens": len(row), "text": policy.decode(row.input_ids)}
            for row in wrong.rows
            for prompt, text in prompts.items()
            if tuple(row.input_ids[: len(prompt)]) == prompt
        ]
        facts = {"step": step, "what": str(wrong), "rows": rows}
        path = run.keep_evidence(f"non-finite-step-{step:06d}", wrong.tensors, facts)
        named = [f"{row['question']!r} ({row['tokens']} tokens)" for row in rows]
        more = f" and {len(named) - 3} more" if len(named) > 3 else ""
        words = f"step {step}: {wrong}, in {', '.join(named[:3])}{more}; it is kept in {path}"
        raise NonFinite(words, wrong.rows, wrong.tensors) from None


def terminate(signum: int, frame) -> None:
    raise Terminated
