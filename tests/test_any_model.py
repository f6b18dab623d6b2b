"""Nothing assumes Qwen, single-token tags, a pad token or a chat template's ways.

A model that recites shows it: whatever its weights, it gives all its probability to the token that
a script holds for the next position. So a rollout tells the script back only if positions stay
contiguous over turns, forks and dropped rows, and if tags are found that are split over tokens.
"""

from dataclasses import replace

import pytest
import torch
from conftest import load, roll_out
from test_rollout import assert_true_to_the_model, granted
from test_update import assert_close, gradient, packed_rows, plain_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
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
# What Qwen3's chat template does with thoughts; Qwen3-*-Thinking-2507 and others open the block.
QWEN3 = """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
OPENS_THINKING = QWEN3.split("    {%- if")[0] + "{{- '<think>\\n' }}{%- endif %}"
SCRIPT = [
    "<think>\n\n</think>\n<adder>2 2</adder>\n",  # an empty thought counts too
    "<result>\n4\n</result>",
    "<think>four</think> <answer>it is \\boxed{4}</answer>\n",
]
ADDER = {"adder": Tool("adder", lambda text: str(sum(map(int, text.split()))), "two numbers")}


def save_model(folder, architecture, pad, template):
    """A model of random weights; byte-level BPE: '>' and a newline become one token, no tag does.

    Returns settings with which it forks wherever it can.
    """
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    words = {"special_tokens": ["<|stop|>", "<|pad|>"], "show_progress": False, "vocab_size": 300}
    words["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
    text = ["x >\n", "y >\n", "the cat sat on the mat"] * 9
    backend.train_from_iterator(text, trainers.BpeTrainer(**words))
    names = {"eos_token": "<|stop|>", "pad_token": pad, "chat_template": template}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    size |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    size |= {"vocab_size": len(tokenizer), "eos_token_id": 0, "bos_token_id": None}
    torch.manual_seed(0)
    shape = AutoConfig.for_model(architecture, **size)
    AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    lengths = {"max_segment_tokens": 200, "max_total_tokens": 2000, "entropy_tokens": 7}
    forks = {"branch_rule": "random", "branch_probability": 1.0, "max_branches": 2, "group_size": 4}
    return Config(model_name=str(folder), load_in_4bit=False, **lengths, **forks)


def recite(policy, token_ids):
    """From now on the model says token_ids[p + 1] at position p; `remove()` ends that."""
    script = torch.tensor([*token_ids, policy.eos_ids[0]])

    def say(module, args, kwargs, out):
        places = (kwargs["position_ids"] + 1).clamp(max=len(script) - 1)
        said = script[places][:, -out.logits.shape[1] :]
        out.logits = out.logits + 1e4 * torch.nn.functional.one_hot(said, out.logits.shape[-1])

    return policy.lm.register_forward_hook(say, with_kwargs=True)


ASKED = "two and two?<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("architecture", "pad", "template", "thinking", "end"),
    [
        ("qwen3", "<|pad|>", PLAIN, True, "[user] two and two?\n[assistant] "),
        ("llama", "<|stop|>", QWEN3, False, ASKED + "<think>\n\n</think>\n\n"),
        ("llama", None, OPENS_THINKING, True, ASKED),
    ],
)
def test_a_recited_transcript_comes_back_as_it_was_written(
    tmp_path, architecture, pad, template, thinking, end
):
    """Then, without the script, what is sampled is what is trained, packed and plain."""
    config = replace(save_model(tmp_path, architecture, pad, template), thinking=thinking)
    policy, question = load(config, ADDER), Question("two and two?", ["4"])
    prompt = policy.prompt(question.text)
    text = policy.decode(prompt)
    assert text.endswith(end) and text.count("<adder>two numbers</adder>") == 1
    parts = [policy.encode(text) for text in SCRIPT]
    assert policy.decode(parts[0][-1:]) == ">\n"  # the last token carries a following character
    assert all(len(policy.encode(tag)) > 2 for tag in ("</adder>", "<answer>", "<result>"))
    script = recite(policy, prompt + [token for part in parts for token in part])
    (leaves,) = roll_out(policy, config, ADDER, [question])
    script.remove()
    assert len(leaves) == 4 and granted([leaves]) == 3
    for leaf in leaves:
        assert [s.token_ids for s in leaf.path()] == [prompt, *parts]
        assert [s.stop for s in leaf.path()] == [None, "tool", None, "answer"]
        assert judge(policy, leaf, question, config).total == 1.0
    small = replace(config, max_segment_tokens=12, micro_batch_tokens=800)
    groups = [*roll_out(policy, small, ADDER, [question]), leaves]
    assert_true_to_the_model(policy, groups[:1], small)
    packed, plain = (rows(groups, small) for rows in (packed_rows, plain_rows))
    assert 2 < len(packed) < len(plain) == 8  # some trees are cut, and some are not
    assert_close(gradient(policy, packed, small), gradient(policy, plain, small))


def test_a_file_replaces_the_system_prompt(tmp_path):
    path, config = tmp_path / "mine.txt", save_model(tmp_path, "llama", None, PLAIN)
    path.write_text("Do as the oracle says. {tools}\nEnd with \\boxed{x}.\n")
    policy = load(replace(config, system_prompt=str(path)), ADDER)
    expected = "Do as the oracle says. <adder>two numbers</adder>\nEnd with \\boxed{x}."
    assert policy.decode(policy.prompt("why?")).startswith(f"[system] {expected}\n[user] why?")
    with pytest.raises(UserError, match=r"^--system_prompt no/such\.txt: No such file"):
        load(replace(config, system_prompt="no/such.txt"), ADDER)
