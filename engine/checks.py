"""What cannot be used is refused: questions too long, models that would train silently wrong.

A tree is written from a cache that forks and trained as one packed row. A layer that looks at more
than the mask, the positions and the cache that it is given makes other numbers of it.
"""

from __future__ import annotations

import dataclasses
import re

import torch

from advantage import Segment
from data.files import UserError
from engine.packing import NonFinite, make_batch, make_row, token_logprobs


def refuse_windows(lm, longest: int) -> None:
    """In a batch, what is known of one path and unread of another are up to twice the longest."""
    shape = lm.config.get_text_config()
    odd = {*(getattr(shape, "layer_types", None) or [])}
    odd = sorted(odd - {"full_attention", "sliding_attention", "chunked_attention"})
    small = [
        (name, size)
        for name, size in vars(shape).items()
        if re.fullmatch(r"(\w+_)?(window|chunk)(_size)?", name)
        and type(size) is int  # and no bool
        and 0 < size < 2 * longest
    ]
    rope = getattr(shape, "rope_parameters", None) or {}  # of all layers, or by kind of layer
    for each in (rope, *rope.values()):
        if isinstance(each, dict) and each.get("rope_type") == "longrope":
            # Beyond it, one long path changes the rotations of the others, and of what is cached.
            name = "original_max_position_embeddings"
            size = each.get(name) or getattr(shape, name, None) or 0
            small += [(f"longrope with {name}", size)] * (size < longest)
    odd += [f"{name} {size}, too small for --max_total_tokens {longest}" for name, size in small]
    if odd:
        raise ValueError(f"the model has {', '.join(odd)}, which is not supported here")


def require_same_logprobs(policy, config) -> None:
    """A short tree: as it was sampled, in one packed row, in plain rows. ValueError if they differ.

    Then a layer does not follow the mask, positions or cache that it is given, or the logits are
    not the head's own (a cap, a scale). The head's logits are scaled to a spread of 100, for a
    temperature of 100: random weights, too, then show a cap and draw among many tokens.
    """
    from engine.writer import Writer  # which imports this file

    limits = {"max_segment_tokens": 1, "max_total_tokens": 64}
    writer = Writer(policy, dataclasses.replace(config, temperature=100.0, top_p=1.0, **limits))
    tokens, scale = policy.encode(" ".join(map(str, range(60)))), []
    root = Segment("prompt", tokens[:8])
    results = [Segment("tool", tokens[8:32], root), Segment("tool", tokens[32:40], root)]
    policy.limits.recompute = True  # layers are told that they are in training: no noise may come

    def louder(head, args, logits):
        x = logits.float()
        scale.append(100 / max(x.std().item(), x.abs().mean().item() / 100, 1e-9))
        return scale[0] * logits

    hook = policy.lm.get_output_embeddings().register_forward_hook(louder)
    gpus = [policy.device] if policy.device.type == "cuda" else []
    with hook, torch.random.fork_rng(gpus), torch.no_grad():
        drafts = writer.begin([root], 1) + writer.begin(results * 8, 1)
        credit = {draft: {draft: 1.0} for draft in drafts}
        for trees in ([drafts], [[draft] for draft in drafts[:3]]):
            rows = [make_row(leaves, credit) for leaves in trees]
            batch = make_batch(rows, policy.pad_id, policy.device, policy.lm.dtype)
            off = token_logprobs(policy, batch, temperature=100.0) - batch.sampled_logp  # (B, T)
            off = off[~batch.sampled_logp.isnan()].abs().max().item()
            # 0.001 in float32 and 0.27 in bfloat16; rounding was below 1e-5 and 0.15 everywhere.
            if not off < 3 * torch.finfo(policy.lm.dtype).eps ** 0.5:
                why = "a window, ALiBi, a recurrent layer, dropout or scaled logits do that"
                raise ValueError(f"log-probs of a forked row are {off:.2g} off the sampled; {why}")


def refuse_overflow(head, args, logits: torch.Tensor) -> None:
    """Hook of a model in float16: what got beyond its largest number, 65504, is inf or nan here."""
    if not logits.isfinite().all():
        words = "activations are too large for float16"
        raise NonFinite(f"{words}; --dtype bfloat16 or --dtype float32 has room for them", [])


def refuse_long(policy, questions: list, path: str, config) -> None:
    """A prompt that leaves no room to answer is named before the work begins: UserError."""
    room = min(config.max_total_tokens, policy.context)
    for number, question in enumerate(questions, start=1):
        if (n := len(policy.prompt(question.text))) >= room:
            limit = f"no room to answer within --max_total_tokens and the model's context ({room})"
            raise UserError(f"{path}, question {number}: a prompt of {n} tokens leaves {limit}")
