"""Nothing assumes Qwen, single-token tags or a pad token.

A model that recites shows it: whatever its weights, it gives all its probability to the token that
a script holds for the next position. So a rollout tells the script back only if positions stay
contiguous over turns, forks and dropped rows, and if tags are found that are split over tokens.
"""

import dataclasses
import functools

import pytest
import torch
from conftest import roll_out, with_random_adapter
from test_rollout import assert_sampler_matches_trainer
from test_update import assert_close, gradient, rows_of
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from advantage import shared_by
from arpo_mini import UserError, main, score, train_step
from data.formats import Question
from engine.model import load_policy
from app.config import Config
from app.screen import log_line
from tools import Tool

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
RESULT = "<result>\n4\n</result>"
SCRIPT = [
    "<think>add the two</think>\n<adder>2 2</adder>\n",
    RESULT,
    "<think>again</think>\n<adder>3 1</adder>\n",
    RESULT,
    "<think>four</think> <answer>it is \\boxed{4}</answer>\n",
]


def save_tokenizer(folder, pad):
    """Byte-level BPE over ordinary text: '>' and a newline become one token, no tag does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|stop|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["x >\n", "y >\n", "the cat sat on the mat"] * 9, trainer)
    names = {"eos_token": "<|stop|>", "chat_template": TEMPLATE}
    names |= {"other": {"pad_token": "<|pad|>"}, "eos": {"pad_token": "<|stop|>"}, "missing": {}}[
        pad
    ]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(folder, architecture, vocab_size):
    size = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "eos_token_id": 0,
        "bos_token_id": None,
        "tie_word_embeddings": False,
    }
    if architecture == "llama":
        LlamaForCausalLM(LlamaConfig(**size)).save_pretrained(folder)
    else:
        Qwen3ForCausalLM(Qwen3Config(head_dim=8, **size)).save_pretrained(folder)


def recite(policy, token_ids):
    """From now on the model says token_ids[p + 1] at position p."""
    script = torch.tensor([*token_ids, policy.eos_ids[0]])
    original = policy.lm.forward

    @functools.wraps(original)
    def forward(*args, position_ids=None, **kwargs):
        out = original(*args, position_ids=position_ids, **kwargs)
        said = script[(position_ids + 1).clamp(max=len(script) - 1)][:, -out.logits.shape[1] :]
        out.logits = out.logits + 1e4 * torch.nn.functional.one_hot(said, out.logits.shape[-1])
        return out

    policy.lm.forward = forward


ADDER = Tool("adder", lambda text: str(sum(map(int, text.split()))), "two numbers")


def settings(folder):
    return Config(
        model_name=str(folder),
        load_in_4bit=False,
        branch_rule="random",
        branch_probability=1.0,
        max_segment_tokens=200,
        max_total_tokens=2000,
        entropy_tokens=7,
    )


@pytest.fixture(params=[("qwen3", "other"), ("llama", "eos"), ("llama", "missing")], ids=str)
def loaded(request, tmp_path):
    architecture, pad = request.param
    torch.manual_seed(0)
    save_model(tmp_path, architecture, len(save_tokenizer(tmp_path, pad)))
    config, tools = settings(tmp_path), {"adder": ADDER}
    return load_policy(config, tools, trainable=True), config, tools


def test_a_recited_transcript_comes_back_as_it_was_written(loaded):
    policy, config, tools = loaded
    question = Question("two and two?", ["4"])
    prompt = policy.prompt(question.text)
    parts = [policy.encode(text) for text in SCRIPT]
    assert policy.decode(parts[0][-1:]) == ">\n"  # the last token carries a following character
    assert all(len(policy.encode(tag)) > 2 for tag in ("</adder>", "<answer>", "<result>"))
    recite(policy, prompt + [token for part in parts for token in part])
    (leaves,) = roll_out(policy, config, tools, [question])
    forks = sum(s.decision.granted for s in shared_by(leaves) if s.decision)
    assert len(leaves) == config.group_size
    assert forks == config.group_size - config.initial_rollouts > 0
    for leaf in leaves:
        path = leaf.path()
        assert [s.token_ids for s in path[1:]] == parts
        assert [s.stop for s in path] == [None, "tool", None, "tool", None, "answer"]
        reward = score(policy, leaf, question, config, tools)
        assert reward.well_formed and reward.total == 1.0


@pytest.mark.parametrize("packed_at", [10_000, 430])
def test_what_is_sampled_is_what_is_trained(loaded, packed_at):
    """On every architecture: log-probs, and the gradient of packed, cut and plain rows."""
    policy, config, tools = loaded
    with_random_adapter(policy)
    config = dataclasses.replace(config, max_segment_tokens=12, micro_batch_tokens=packed_at)
    (leaves,) = roll_out(policy, config, tools, [Question("two and two?", ["4"])])
    assert_sampler_matches_trainer(policy, [leaves], 1e-4, at_least=40)
    packed = rows_of([leaves], config, packed=True)
    plain = rows_of([leaves], config, packed=False)
    assert sum(map(len, packed)) < sum(map(len, plain))
    assert_close(gradient(policy, packed, config), gradient(policy, plain, config))


def test_the_system_prompt_comes_from_the_tools(loaded):
    policy, _, _ = loaded
    text = policy.decode(policy.prompt("why?"))
    assert "<adder>two numbers</adder>" in text and "[user] why?" in text
    assert text.endswith("[assistant] ")
    assert "\\boxed{the answer alone}" in text


def test_a_file_replaces_the_system_prompt(loaded, tmp_path, capsys):
    _, config, tools = loaded
    path = tmp_path / "mine.txt"
    path.write_text("Do as the oracle says. {tools}\nEnd with \\boxed{x}.\n")
    policy = load_policy(dataclasses.replace(config, system_prompt=str(path)), tools, False)
    expected = "Do as the oracle says. <adder>two numbers</adder>\nEnd with \\boxed{x}."
    assert policy.system_prompt == expected
    assert policy.decode(policy.prompt("why?")).startswith(f"[system] {expected}\n[user]")
    assert main(["show", "--system_prompt", "no/such.txt"]) == 2
    error = capsys.readouterr().err
    assert "--system_prompt no/such.txt" in error and len(error.splitlines()) == 1


# The parts of Qwen3's chat template that matter here: what it does with thoughts.
QWEN3_TEMPLATE = """\
{%- set ns = namespace(last=0) %}
{%- for m in messages if m.role == 'user' %}{% set ns.last = messages.index(m) %}{% endfor %}
{%- for m in messages %}
    {%- set content = m.content %}
    {%- if m.role == 'assistant' and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
# Qwen3-*-Thinking-2507 and others open the block themselves.
OPENS_THINKING = QWEN3_TEMPLATE.split("    {%- if enable_thinking")[0] + (
    "    {{- '<think>\\n' }}\n{%- endif %}"
)


@pytest.mark.parametrize(
    ("template", "thinking", "end"),
    [
        (QWEN3_TEMPLATE, True, "<|im_start|>assistant\n"),
        (QWEN3_TEMPLATE, False, "<|im_start|>assistant\n<think>\n\n</think>\n\n"),
        (OPENS_THINKING, True, "<|im_start|>assistant\n"),
    ],
    ids=["a real think block", "an empty think block", "a block the template opens"],
)
def test_qwen3_thinking(tmp_path, template, thinking, end):
    """Every thought is the policy's own and stays: ids are appended, nothing is rendered again."""
    torch.manual_seed(0)
    tokenizer = save_tokenizer(tmp_path, "other")
    tokenizer.chat_template = template
    tokenizer.save_pretrained(tmp_path)
    save_model(tmp_path, "qwen3", len(tokenizer))
    config = dataclasses.replace(settings(tmp_path), thinking=thinking)
    tools = {"adder": ADDER}
    policy = load_policy(config, tools, trainable=True)
    question = Question("two and two?", ["4"])
    prompt = policy.prompt(question.text)
    assert policy.decode(prompt).endswith(end)
    script = [SCRIPT[0].replace("add the two", "\n\n"), *SCRIPT[1:]]  # an empty thought counts too
    parts = [policy.encode(text) for text in script]
    recite(policy, prompt + [token for part in parts for token in part])
    (leaves,) = roll_out(policy, config, tools, [question])
    for leaf in leaves:
        assert [s.token_ids for s in leaf.path()] == [prompt, *parts]
        assert policy.decode([t for s in leaf.path() for t in s.token_ids]).endswith(
            "".join(script)
        )
        assert score(policy, leaf, question, config, tools).total == 1.0


def test_training_a_step_reports_packed_and_plain_tokens(loaded):
    policy, config, tools = loaded
    # it recites, so all rewards are equal: only the KL term has them trained
    config = dataclasses.replace(config, max_segment_tokens=12, kl_coefficient=0.1)
    optimizer = torch.optim.AdamW(p for p in policy.model.parameters() if p.requires_grad)
    metrics, groups, _ = train_step(policy, optimizer, [Question("a?", ["4"])], config, tools, 1)
    plain = sum(len(s.token_ids) for leaf in groups[0] for s in leaf.path())
    packed = sum(len(segment.token_ids) for segment in shared_by(groups[0]))
    assert (metrics["train_tokens"], metrics["train_tokens_unpacked"]) == (packed, plain)
    assert packed < plain and f"{packed / 1000:.1f}k/{plain / 1000:.1f}k" in log_line(1, metrics)


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    tokenizer = save_tokenizer(tmp_path, "other")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    save_model(tmp_path, "llama", len(tokenizer))
    config = dataclasses.replace(Config(), model_name=str(tmp_path), load_in_4bit=False)
    with pytest.raises(UserError, match="chat template"):
        load_policy(config, {}, trainable=False)
