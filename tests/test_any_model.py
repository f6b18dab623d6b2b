"""Nothing assumes Qwen, single-token tags, a pad token or a chat template's ways.

A model that recites gives all its probability to the token that a script holds for the position.
"""

from dataclasses import replace

import pytest
import torch
from conftest import load, roll_out
from test_rollout import assert_true_to_the_model, granted
from test_update import assert_close, gradient, packed_rows, plain_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from app.config import Config
from arpo_mini import judge
from data.files import UserError
from data.formats import Question
from tools import Tool

PLAIN = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
MAY_SKIP = PLAIN + "{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"  # as Qwen3's
OPENS = PLAIN + "{% if add_generation_prompt %}<think>\n{% endif %}"  # as Qwen3-*-Thinking-2507's
SCRIPT = [
    "<think>\n\n</think>\n<adder>2 2</adder>\n",  # an empty thought counts too
    "<result>\n4\n</result>",
    "<think>four</think> <answer>it is \\boxed{4}</answer>\n",
]
ADDER = {"adder": Tool("adder", lambda text: str(sum(map(int, text.split()))), "two numbers")}


def save_model(folder, architecture="llama", pad=None, template=PLAIN):
    """A model of random weights, with a token for each byte and one for '>' and a newline.

    Returns settings with which it forks wherever it can.
    """
    texts = ["<|stop|>", "<|pad|>", *sorted(pre_tokenizers.ByteLevel.alphabet()), ">\u010a"]
    backend = Tokenizer(models.BPE({text: i for i, text in enumerate(texts)}, [(">", "\u010a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = {"eos_token": "<|stop|>", "pad_token": pad, "chat_template": template}
    PreTrainedTokenizerFast(tokenizer_object=backend, **names).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    size |= {"vocab_size": len(texts), "eos_token_id": 0, "bos_token_id": None}
    torch.manual_seed(0)
    shape = AutoConfig.for_model(architecture, **size)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    lengths = {"max_segment_tokens": 200, "max_total_tokens": 2000, "entropy_tokens": 7}
    forks = {"branch_rule": "random", "branch_probability": 1.0, "max_branches": 3, "group_size": 4}
    return Config(model_name=str(folder), load_in_4bit=False, **lengths, **forks)


def recite(policy, token_ids):
    """From now on the model says token_ids[p + 1] at position p; `remove()` ends that."""
    script = torch.tensor([*token_ids, policy.eos_ids[0]])

    def say(module, args, kwargs, out):
        places = (kwargs["position_ids"] + 1).clamp(max=len(script) - 1)
        said = script[places][:, -out.logits.shape[1] :]
        out.logits = out.logits + 1e4 * torch.nn.functional.one_hot(said, out.logits.shape[-1])

    return policy.lm.register_forward_hook(say, with_kwargs=True)


@pytest.mark.parametrize(
    ("architecture", "pad", "template", "thinking", "end"),
    [
        ("qwen3", "<|pad|>", MAY_SKIP, True, ""),
        ("llama", "<|stop|>", MAY_SKIP, False, "<think>\n\n</think>"),
        ("llama", None, OPENS, True, ""),
    ],
)
def test_a_transcript_comes_back_as_recited(tmp_path, architecture, pad, template, thinking, end):
    """Then, without the script, what is sampled is what is trained, packed and plain."""
    config = replace(save_model(tmp_path, architecture, pad, template), thinking=thinking)
    policy, question = load(config, ADDER), Question("two and two?", ["4"])
    prompt, parts = policy.prompt(question.text), [policy.encode(text) for text in SCRIPT]
    text = policy.decode(prompt)
    assert text.endswith("\n[user] two and two?\n[assistant] " + end)
    assert text.count("<adder>two numbers</adder>") == 1
    assert policy.decode(parts[0][-1:]) == ">\n"  # the last token carries a following character
    script = recite(policy, prompt + [token for part in parts for token in part])
    (leaves,) = roll_out(policy, config, ADDER, [question])
    script.remove()
    assert len(leaves) == 4 and granted([leaves]) == 3
    for leaf in leaves:
        assert [s.token_ids for s in leaf.path()] == [prompt, *parts]
        assert [s.stop for s in leaf.path()] == [None, "tool", None, "answer"]
        assert judge(policy, leaf, question, config).total == 1.0
    fits = max(leaf.depth() for leaf in leaves)
    small = replace(config, max_segment_tokens=12, micro_batch_tokens=fits)
    groups = [*roll_out(policy, small, ADDER, [question]), leaves]
    assert_true_to_the_model(policy, groups[:1], small)
    packed, plain = (rows(groups, small) for rows in (packed_rows, plain_rows))
    assert 2 < len(packed) < len(plain) == 8  # some trees are cut, and some are not
    assert_close(gradient(policy, packed, small), gradient(policy, plain, small))


def test_a_file_replaces_the_system_prompt(tmp_path):
    path, config = tmp_path / "mine.txt", save_model(tmp_path)
    path.write_text("Do as the oracle says. {tools}\nEnd with \\boxed{x}.\n")
    policy = load(replace(config, system_prompt=str(path)), ADDER)
    expected = "Do as the oracle says. <adder>two numbers</adder>\nEnd with \\boxed{x}."
    assert policy.decode(policy.prompt("why?")).startswith(f"[system] {expected}\n[user] why?")
    with pytest.raises(UserError, match=r"^--system_prompt no/such\.txt: No such file"):
        load(replace(config, system_prompt="no/such.txt"), ADDER)
