"""Windows and macOS, pretended: what is absent there, line ends, paths."""

from unittest.mock import Mock

import pytest
from common import ROOT, lines_of, python, write_questions

from app.config import Config
from data.files import UserError
from engine import model

WITHOUT = """
import os, runpy, signal, sys
sys.modules["fcntl"] = None  # an import of it fails
for name in ("SIGHUP", "SIGPROF", "SIGALRM", "setitimer", "ITIMER_PROF"):
    delattr(signal, name)
del os.fork, os.sched_getaffinity
def open_file(path, *args, real=os.open, **kwargs):
    if os.path.isdir(path):
        raise PermissionError(13, "a folder")
    return real(path, *args, **kwargs)
os.open = open_file
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_a_run_where_half_of_the_system_is_absent(tmp_path):
    """No fcntl, no fork, no timers, no sync of folders; CRLF files and a folder with spaces."""
    folder, few = tmp_path / "my runs", tmp_path / "few questions.jsonl"
    write_questions(few)
    flags = "--steps 2 --questions_per_step 2 --group_size 2 --max_segment_tokens 40 --eval_part 1"
    first = [*flags.split(), "--dataset_path", few, "--eval_path", few, "--output_dir", folder]
    for more in (first, ["--resume", folder, "--steps", 3]):
        for path in (few, *folder.glob("*.json*")):
            path.write_text(path.read_text("utf-8"), "utf-8", newline="\r\n")
        done = python("-c", WITHOUT, ROOT / "arpo_mini.py", "train", *more)
        assert done.returncode == 0, done.stderr
    assert [row["step"] for row in lines_of(folder, "metrics.jsonl")] == [1, 2, 3]
    done = python("-c", WITHOUT, ROOT / "lab" / "compare.py", "draw", folder)
    assert done.returncode == 2 and "results.json: No such file" in done.stderr


@pytest.mark.parametrize(
    "error",
    [
        ImportError("Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip install`"),
        NotImplementedError("Could not run 'bitsandbytes::gemv_4bit' with arguments from 'CPU'"),
    ],
)
def test_where_nf4_does_not_run_one_line_says_what_does(error, monkeypatch):
    monkeypatch.setattr(model, "load_model", Mock(side_effect=error))
    for in_4bit in (True, False):
        with pytest.raises(UserError) as said:
            model.load_policy(Config(load_in_4bit=in_4bit), {}, trainable=True)
        assert str(said.value).endswith("; --load_in_4bit false does without it") == in_4bit
