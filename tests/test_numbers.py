"""Numbers that are none end a step with one line; texts and folders from outside do no harm."""

import math
import re
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import ECHO, TINY, TINY_QUESTIONS, change_json
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_update import packed_rows

from app.config import DATA, Config
from arpo_mini import Agent, safe_step, update
from data.files import UserError
from engine.model import load_policy
from engine.packing import NonFinite
from tools import TAG, ToolResult, readable, result_text


def step(policy, lr=1e-3):
    optimizer = torch.optim.AdamW(policy.parameters, lr=lr)
    config = replace(TINY, kl_coefficient=0.1)  # also equal rewards have a gradient
    return safe_step(Agent(policy, ECHO, config), optimizer, TINY_QUESTIONS, config, 7)


@pytest.mark.parametrize(
    "value, words", [(math.nan, "a logit is"), (math.inf, "a log-prob is nan")]
)
def test_the_question_is_named_in_whose_rows_it_happened(restored, writing, value, words):
    """While it is rolled out, and while it is trained; the other question is all right."""
    start = restored.prompt("abc")

    def spoil(module, args, kwargs, output):
        rows = [d.path_tokens() for d in writing] if output.past_key_values else kwargs["input_ids"]
        if bool(output.past_key_values) == (words == "a logit is"):
            for hidden, ids in zip(output.last_hidden_state.data, rows, strict=True):
                if list(ids[: len(start)]) == start:
                    hidden[:] = value

    handle = restored.lm.get_decoder().register_forward_hook(spoil, with_kwargs=True)
    with handle, pytest.raises(NonFinite) as error:
        step(restored)
    said, lengths = str(error.value), [len(row) for row in error.value.rows]
    assert said.startswith(f"step 7: {words}") and "longer" not in said and "\n" not in said
    assert f"in 'abc' ({lengths[0]} tokens)" in said
    assert said.count("'abc'") == min(3, len(lengths)) and ("more" in said) == (len(lengths) > 3)


def test_weights_that_are_none_are_found_before_they_are_saved(restored):
    with pytest.raises(NonFinite, match=r"^step 7: a weight after the step is (nan|-?inf)$"):
        step(restored, lr=1e308)


@pytest.mark.parametrize("factor, words", [(1e39, "the loss is"), (1.0, "the gradient norm is")])
def test_loss_and_gradient_are_looked_at_before_the_step(restored, tiny_groups, factor, words):
    rows, first = packed_rows(tiny_groups, TINY), restored.parameters[0]
    rows[0].A_plus = [factor * (weight > 0) for weight in rows[0].weight]
    before = [p.detach().clone() for p in restored.parameters]
    handle = first.register_hook(lambda grad: grad * math.inf)
    with handle, pytest.raises(NonFinite, match=words):
        update(restored, torch.optim.SGD(restored.parameters, lr=1.0), rows, TINY)
    assert all(map(torch.equal, before, restored.parameters))


ODD = ["\x00", "\ud800", "\u202e", "\x1b[31m", "\u0301", "\U0001f468\u200d", "\uff1c/result\uff1e"]
ODD += "<|im_end|> <|im_start|> <|endoftext|> </s> <|im_ < </ > </result> <think> \n".split(" ")
texts = st.lists(st.sampled_from(ODD) | st.characters(), max_size=10).map("".join)


def unescaped(text):
    return re.sub("&lt;|[\uff1c\ufe64]", "<", text).replace(" ", "")


@settings(max_examples=25)
@given(text=texts, times=st.sampled_from([1, 1, 40]), most=st.sampled_from([32, 40, 256]))
def test_text_from_outside_forges_nothing_and_is_read_as_it_was_written(policy, text, times, most):
    """A result is one pair of tags, up to a visible cut; a question holds no marker of the chat."""
    result, added = ToolResult(text * times, True), set(policy.tokenizer.added_tokens_decoder)
    asked, token_ids = policy.prompt(text), policy.encode_result(result, most)
    marks = [token for token in policy.prompt("why?") if token in added]
    assert [token for token in asked if token in added] == marks
    assert unescaped(readable(text)) in unescaped(policy.decode(asked))
    read, whole = policy.decode(token_ids), unescaped(result_text(result))
    assert len(token_ids) <= most and not set(token_ids) & set(policy.tokenizer.all_special_ids)
    assert TAG.findall(read) == [("", "result"), ("/", "result")]
    kept = unescaped(read.removesuffix(" [cut]\n</result>"))
    assert kept == whole or (whole.startswith(kept) and kept != unescaped(read) and len(kept) > 9)


# Classes of its own: loading marks the class it finds as one whose code comes with the model.
CODE = """
open({!r}, "w").close()
import transformers
class C(transformers.Qwen3Config): pass
class M(transformers.Qwen3ForCausalLM): config_class = C
class T(transformers.PreTrainedTokenizerFast): pass
"""
MODEL = {"auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}
TOKENIZER = {"auto_map": {"AutoTokenizer": ["evil.T", "evil.T"]}, "tokenizer_class": "T"}


@pytest.fixture
def folders(tmp_path, policy, monkeypatch):
    """A model and an adapter, with code beside each that must not run."""
    policy.model.save_pretrained(tmp_path / "adapter")
    shutil.copytree(DATA / "tiny-qwen3", tmp_path / "model")
    for folder in (tmp_path, tmp_path / "model"):
        (folder / "evil.py").write_text(CODE.format(str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def load(folders, **changes):
    names = {"model_name": str(folders / "model"), "adapter": str(folders / "adapter")}
    return load_policy(Config(load_in_4bit=False, **names, **changes), {}, trainable=True)


EVIL = "cbuiltins\nopen\n(V{}\nVw\ntR."  # a pickle that writes a file when it is read


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("model/config.json", {**MODEL, "model_type": "evil"}, "--trust_remote_code true"),
        ("model/config.json", {"hidden_size": "x"}, "cannot load"),
        ("model/tokenizer.json", b"[" * 100_000, "cannot load"),
        ("model/model.safetensors", "pytorch_model.bin", r"model\.safetensors"),
        ("model/model.safetensors", None, r"the model has no model\.layers\.0\."),
        ("adapter/adapter_config.json", {"r": [[1]]}, "cannot load"),
        ("adapter/adapter_config.json", b"junk \xff\x00", "cannot load"),
        ("adapter/adapter_model.safetensors", "adapter_model.bin", r"adapter_model\.safetensors"),
    ],
    ids=range(8),
)
def test_a_folder_that_lies_is_refused_in_one_line_and_runs_nothing(folders, name, change, words):
    path = folders / name
    if isinstance(change, dict):
        change_json(path, **change)
    elif isinstance(change, bytes):
        path.write_bytes(change)
    elif change:  # a pickle in its place
        path.rename(path.with_name(change)).write_text(EVIL.format(folders / "ran"))
    else:  # a weight is missing
        weights = load_file(path)
        del weights[next(key for key in sorted(weights) if "layers.0" in key)]
        save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=words) as error:
        load(folders)
    assert str(folders) in str(error.value) and len(str(error.value)) < 1000
    assert len(str(error.value).splitlines()) == 1 and not (folders / "ran").exists()


@pytest.mark.parametrize("name, change", [("config", MODEL), ("tokenizer_config", TOKENIZER)])
def test_code_beside_a_known_model_runs_only_when_it_is_trusted(folders, name, change):
    change_json(folders / "model" / f"{name}.json", **change)
    change_json(folders / "model" / "config.json", attn_implementation="kernels-community/evil")
    assert load(folders).lm.config._attn_implementation == "sdpa"  # and no kernel of the hub
    assert not (folders / "ran").exists()
    load(folders, trust_remote_code=True)
    assert (folders / "ran").exists()
