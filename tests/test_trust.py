"""What a folder of a model or of an adapter may do: no code, no pickle, nothing made up."""

import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from app.config import DATA, Config
from data.files import UserError
from engine.model import load_policy

# Classes of its own: loading marks the class it finds as one whose code comes with the model.
CODE = """
open({!r}, "w").close()
import transformers
class C(transformers.Qwen3Config): pass
class M(transformers.Qwen3ForCausalLM): config_class = C
class T(transformers.PreTrainedTokenizerFast): pass
"""


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def change_json(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.fixture
def model_folder(tmp_path):
    return shutil.copytree(DATA / "tiny-qwen3", tmp_path / "model")


@pytest.fixture
def adapter_folder(tmp_path, policy):
    policy.model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(model, adapter=None, **settings):
    settings |= {"model_name": str(model), "adapter": adapter and str(adapter)}
    return load_policy(Config(load_in_4bit=False, **settings), {}, trainable=True)


def assert_refused(words, model, adapter=None):
    with pytest.raises(UserError, match=words) as error:
        load(model, adapter)
    assert str(adapter or model) in str(error.value) and len(str(error.value)) < 1000


MODEL_MAP = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}


@pytest.mark.parametrize("kind", ["model", "tokenizer", "known model"])
def test_a_folders_code_runs_only_when_it_is_trusted(model_folder, tmp_path, kind):
    ran = tmp_path / "ran"
    (model_folder / "evil.py").write_text(CODE.format(str(ran)))
    if kind == "tokenizer":
        path = model_folder / "tokenizer_config.json"
        change_json(path, auto_map={"AutoTokenizer": ["evil.T", "evil.T"]}, tokenizer_class="T")
    else:
        change_json(model_folder / "config.json", auto_map=MODEL_MAP)
    if kind == "model":  # transformers has none of that name: only the folder's code knows it
        change_json(model_folder / "config.json", model_type="evil")
        assert_refused("--trust_remote_code true", model_folder)
    else:
        load(model_folder)
    assert not ran.exists()
    if kind != "model":
        load(model_folder, trust_remote_code=True)
        assert ran.exists()


def test_a_config_cannot_name_a_kernel_of_the_hub(model_folder):
    for key in ("_attn_implementation", "attn_implementation"):
        change_json(model_folder / "config.json", **{key: "kernels-community/evil"})
        assert load(model_folder).lm.config._attn_implementation == "sdpa"


def test_nothing_is_unpickled(model_folder, adapter_folder, tmp_path):
    ran = tmp_path / "ran"
    (adapter_folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil(ran)}, adapter_folder / "adapter_model.bin")
    assert_refused(r"no adapter_model\.safetensors", DATA / "tiny-qwen3", adapter_folder)
    (model_folder / "model.safetensors").unlink()
    torch.save({"x": Evil(ran)}, model_folder / "pytorch_model.bin")
    assert_refused(r"model\.safetensors", model_folder)
    assert not ran.exists()
    torch.load(model_folder / "pytorch_model.bin", weights_only=False)
    assert ran.exists()  # it would have


@pytest.mark.parametrize(
    "settings",
    [
        {"megatron_config": {"a": 1}, "megatron_core": "evil_core"},  # a module to import
        {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2},
    ],
)
def test_an_adapter_that_is_no_plain_lora_is_refused(
    adapter_folder, tmp_path, monkeypatch, settings
):
    (tmp_path / "evil_core.py").write_text(CODE.format(str(tmp_path / "ran")))
    monkeypatch.syspath_prepend(tmp_path)
    change_json(adapter_folder / "adapter_config.json", **settings)
    assert_refused("not a plain LoRA", DATA / "tiny-qwen3", adapter_folder)
    assert not (tmp_path / "ran").exists()


def test_missing_weights_are_not_made_up(model_folder, adapter_folder):
    for folder, name, words in (
        (model_folder, "model", r"the model has no model\.layers\.0\."),
        (adapter_folder, "adapter_model", "missing adapter keys"),
    ):
        path = folder / f"{name}.safetensors"
        weights = load_file(path)
        del weights[next(key for key in sorted(weights) if "layers.0" in key)]
        save_file(weights, path, metadata={"format": "pt"})
        both = (folder, None) if folder == model_folder else (DATA / "tiny-qwen3", folder)
        assert_refused(words, *both)


JUNK_FILES = [b"", b"[]", b"{}", b"7", b"null", b"junk \xff\x00", b"[" * 100_000, b'{"a": NaN}']
JUNK_VALUES = ["x", -1, 0, None, [], {}, 10**30, [[1]], 1.5]


@pytest.mark.slow
@pytest.mark.parametrize("junk", [*JUNK_FILES, *JUNK_VALUES], ids=lambda junk: repr(junk)[:12])
def test_a_folder_of_junk_is_refused_in_one_line(model_folder, adapter_folder, junk):
    """Or loaded, where the junk is in something that plays no part."""
    for folder in (model_folder, adapter_folder):
        for path in sorted(folder.glob("*")):
            whole = path.read_bytes()
            if isinstance(junk, bytes):
                changes = [junk]
            elif path.name in ("config.json", "tokenizer_config.json", "adapter_config.json"):
                keys = json.loads(whole)
                changes = [json.dumps({**keys, key: junk}).encode() for key in keys]
            else:
                continue
            for change in changes:
                path.write_bytes(change)
                with contextlib.suppress(UserError):
                    load(model_folder, adapter_folder)
            path.write_bytes(whole)
