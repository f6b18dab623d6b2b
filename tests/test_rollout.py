"""The rollout: the right leaves and log-probs, nothing computed twice, the same each time."""

import itertools
import math
import random
from collections import Counter
from dataclasses import fields, replace

import pytest
import torch
from common import ECHO, TINY, TINY_QUESTIONS, roll_out
from transformers import TopPLogitsWarper

import arpo_mini
import engine.writer
from advantage import Segment, shared_by
from app.config import Config
from arpo_mini import Budget, decide_forks, rollout, spend_rest
from engine.packing import make_batch, make_row, token_logprobs
from engine.writer import Writer
from entropy import RULES, official_entropy

# Every rule forks at nearly every result that it may fork at.
EAGER = {"branch_probability": 0.9, "entropy_sigma": -2.0, "entropy_threshold": -1.0}


def every_segment(groups):
    return [segment for leaves in groups for segment in shared_by(leaves)]


def policy_segments(groups):
    return [segment for segment in every_segment(groups) if segment.author == "policy"]


def granted(groups):
    return sum(s.decision.granted for s in every_segment(groups) if s.decision)


def trees(groups):
    """What was written and decided; not the entropies, which rounding changes."""
    return [
        [(s.token_ids, s.stop, s.decision and s.decision.granted) for s in leaf.path()]
        for leaf in itertools.chain(*groups)
    ]


def logits_of(policy, segment):
    """(n, V) which its n tokens were drawn from, by a plain pass over its path."""
    path = torch.tensor([segment.path_tokens()])
    return policy.lm(path).logits[0, -len(segment.token_ids) - 1 : -1]


@torch.no_grad()
def assert_true_to_the_model(policy, groups, config, tolerance=1e-4, at_least=40):
    """Log-probs of sampler, trainer and a clean pass are the same, and so are the entropies."""
    checked, temperature = 0, config.temperature or 1.0
    for leaves in groups:
        counted = {s: dict.fromkeys(leaves, 1.0) for s in policy_segments([leaves])}
        batch = make_batch([make_row(leaves, counted)], policy.pad_id, policy.device)
        drift = token_logprobs(policy, batch, temperature) - batch.sampled_logp
        drift = drift[~batch.sampled_logp.isnan()]
        assert len(drift) == sum(len(segment.token_ids) for segment in counted)
        assert drift.abs().max() < tolerance
        for segment in counted:
            plain = torch.distributions.Categorical(logits=logits_of(policy, segment) / temperature)
            expected = plain.log_prob(torch.tensor(segment.token_ids)), plain.entropy()
            recorded = torch.tensor([segment.logp, segment.token_entropy])  # (2, n)
            assert (recorded - torch.stack(expected)).abs().max() < tolerance
            H = expected[1][: config.entropy_tokens].mean() / math.log(policy.vocab_size)
            assert config.branch_rule == "official" or abs(segment.entropy - H) < tolerance
        checked += len(drift)
    assert checked > at_least


# rollout_rows, temperature, N, Z; M = 8
WAYS = [(1, 0.7, 5, 2), (3, 1.0, 1, 7), (8, 1.3, 2, 1), (16, 1.0, 8, 4), (128, 1.0, 3, 0)]
WAYS = [(rule, *WAYS[(i + j) % 5]) for i, rule in enumerate(RULES) for j in (0, 2)]
WAYS[1::2] = [pytest.param(*way, marks=pytest.mark.slow) for way in WAYS[1::2]]


@pytest.mark.parametrize("rule, rows, temperature, N, Z", WAYS)
def test_what_is_sampled_is_what_is_trained(tiny, rule, rows, temperature, N, Z):
    """As many leaves as asked for; over turns, forks, dropped rows, padding, groups in turn."""
    config = replace(TINY, branch_rule=rule, rollout_rows=rows, temperature=temperature, **EAGER)
    config = replace(config, initial_rollouts=N, max_branches=Z, max_leaves=10)
    groups = roll_out(tiny, config, ECHO, TINY_QUESTIONS, seed=2)
    assert_true_to_the_model(tiny, groups, config)
    most = {"none": 0, "official": 1}.get(rule, Z)
    rare = (rule == "adaptive" and N < 3) or (rule == "threshold" and Z == 1)  # floor(H) is 0
    assert granted(groups) > 0 or most == 0 or N == 8 or rare
    assert sum(map(len, groups)) == 8 * len(groups)
    for leaves in groups:
        (root, *others), children = shared_by(leaves), Counter(s.parent for s in shared_by(leaves))
        assert children[root] == len(leaves) - granted([leaves]) >= N
        assert len(leaves) == len(set(leaves)) <= 8 + 2 * (rule == "step")
        for segment in others:
            if segment.author == "policy":
                assert segment.token_ids and children[segment] == (segment not in leaves)
            else:
                answered = sum(segment.parent.token_ids) % 2 == 0  # else the tool failed
                assert segment.tool == ("echo" if answered else None)
                assert children[segment] == 1 + segment.decision.granted
                assert segment.decision.granted <= most
                assert segment.decision.granted <= segment.decision.forks or rule == "step"


STEP = replace(TINY, branch_rule="step", group_size=4, initial_rollouts=1, max_leaves=6)
ABOVE = [[-1.0] * 50] * 2  # scores of two steps, after which every result is above the threshold


@pytest.mark.parametrize(
    "score, scores, at_once, most",
    [("entropy", (), 0, 6), ("gain", ABOVE, 2, 6), ("random", (), 0, None)],
)
def test_a_step_has_one_budget(tiny, score, scores, at_once, most):
    """It goes to the questions whose results have the highest scores, and all of it is spent."""
    questions = TINY_QUESTIONS * 3
    config = replace(STEP, branch_score=score, max_branches=2, max_leaves=most)
    groups = rollout(Writer(tiny, config), questions, config, ECHO, 5, scores)
    sizes = [len(leaves) for leaves in groups]
    assert sum(sizes) == 4 * len(questions) and min(sizes) < 4 < max(sizes) <= (most or 8)
    decided = [s.decision for s in every_segment(groups) if s.decision]
    assert {d.forks for d in decided} == {at_once} and max(d.granted for d in decided) == 2
    for d in decided:
        assert score == "random" or d.score == (d.H if score == "entropy" else d.gain)


def test_a_step_spends_its_budget_by_hand():
    """At once above the threshold; then by score, a question's limit and, at last, the question."""
    config, roots = replace(STEP, max_branches=2), [Segment("prompt", [30]) for _ in range(3)]
    drafts = []  # what is written after the first result of three paths
    for root, H_initial, H in zip(roots, (0.05, 0.09, 0.07), (0.5, 0.9, 0.7), strict=True):
        first = Segment("policy", [1], root, entropy=H_initial)
        drafts.append(Segment("policy", [9], Segment("tool", [50], first), entropy=H))
    a, b, c = (draft.parent for draft in drafts)
    budget = Budget(9, random.Random(0), most=4, threshold=0.8)
    budgets = dict.fromkeys(roots, budget)
    assert decide_forks([a.parent, b.parent, c.parent], budgets, config) == []
    assert decide_forks(drafts[:1], budgets, config) == []
    assert decide_forks(drafts[1:], budgets, config) == [b, b] and budget.slots == 7
    assert decide_forks(drafts, budgets, config) == []  # the rest goes on from there
    assert spend_rest(budget, config) == [c, c, a, a, roots[1], roots[1], roots[2]]
    assert budget.slots == 0 and spend_rest(budget, config) == []
    assert [n.decision.granted for n in (a, b, c)] == [2, 2, 2]
    budget.rng, drawn = random.Random(1), random.Random(1)
    decide_forks([a.parent, b.parent, c.parent], budgets, replace(config, branch_score="random"))
    assert [budget.places[root] for root in roots] == [drawn.random() for _ in roots]


@torch.no_grad()
def test_the_released_rule_compares_what_was_written_before_the_result(tiny):
    """By its ten largest log-probs; H at the start is that of the same trajectory."""
    config, lengths = replace(TINY, branch_rule="official", max_segment_tokens=30), []
    groups = roll_out(tiny, config, ECHO, TINY_QUESTIONS * 2, seed=2)
    for result in (s for s in every_segment(groups) if s.author == "tool"):
        decision, first, call = result.decision, result.path()[1], result.parent
        assert (decision.H_initial, decision.H) == (first.entropy, call.entropy)
        lengths.append(len(call.token_ids))
        top = logits_of(tiny, call).log_softmax(-1).topk(10).values.tolist()
        assert call.entropy == pytest.approx(official_entropy(top, tiny.vocab_size), rel=1e-5)
    assert max(lengths) > 20


@torch.no_grad()
def test_what_is_recorded_is_what_was_drawn_from(tiny):
    """The model's own distribution, sharpened and cut; the same for the same seed."""
    config = replace(TINY, temperature=0.6, top_p=0.8, group_size=1, branch_rule="none")
    found, cut = [], TopPLogitsWarper(0.8)
    for seed in (3, 3, 4):
        written = policy_segments(roll_out(tiny, config, ECHO, TINY_QUESTIONS, seed))
        for segment in written:
            probs = cut(None, logits_of(tiny, segment) / 0.6).softmax(-1)  # (n, V)
            drawn = probs.gather(1, torch.tensor(segment.token_ids)[:, None])[:, 0]
            assert segment.logp == pytest.approx(drawn.log().tolist(), abs=1e-5)
            H = torch.special.entr(probs).sum(1)
            assert segment.token_entropy == pytest.approx(H.tolist(), abs=1e-5)
        found.append([segment.token_ids for segment in written])
    assert found[0] == found[1] != found[2]
    greedy = replace(TINY, temperature=0)
    groups = roll_out(tiny, greedy, ECHO, TINY_QUESTIONS)
    assert_true_to_the_model(tiny, groups, greedy)
    for segment in policy_segments(groups):
        assert segment.token_ids == logits_of(tiny, segment).argmax(-1).tolist()


@pytest.fixture
def watch(tiny, writing):
    """What goes through the model: (segment, place in it) -> times; rows of each pass; pads."""
    computed, widths, wasted = Counter(), [], []

    def count(module, args, kwargs):
        ids, places = kwargs["input_ids"], kwargs["position_ids"]  # (R, W)
        mask = kwargs.get("attention_mask", torch.ones_like(ids))[:, -ids.shape[1] :].bool()
        widths.append(len(ids))
        for row, draft in enumerate(writing):
            path = [(s, i) for s in draft.path() for i in range(len(s.token_ids))]
            read = places[row][mask[row]].tolist(), ids[row][mask[row]].tolist()
            for place, token in zip(*read, strict=True):
                if place < len(path):
                    segment, i = path[place]
                    assert segment.token_ids[i] == token
                    computed[segment, i] += 1
                else:  # a row that has ended waits for the others
                    wasted.append(draft)

    with tiny.lm.register_forward_pre_hook(count, with_kwargs=True):
        yield computed, widths, wasted


@pytest.mark.parametrize("rule", ["paper", "step"])
def test_every_prompt_and_result_is_read_once(tiny, watch, rule):
    """But for the last token of a node: every path that starts there needs its logits."""
    computed, widths, wasted = watch
    config = replace(TINY, branch_rule=rule, max_segment_tokens=30)
    writer = Writer(tiny, config)
    groups = rollout(writer, TINY_QUESTIONS, config, ECHO, seed=1)
    starts, prefill = Counter(segment.parent for segment in policy_segments(groups)), 0
    for segment in every_segment(groups):
        *times, last = (computed.pop((segment, i), 0) for i in range(len(segment.token_ids)))
        assert set(times) <= {1}
        assert last <= 1 if segment.author == "policy" else 1 <= last <= starts[segment]
        prefill += (sum(times) + last) * (segment.author != "policy")
    assert writer.prefill_tokens == prefill and not computed
    assert writer.decode_steps == len(widths) and max(widths) <= 16
    generated = sum(len(segment.token_ids) for segment in policy_segments(groups))
    assert len(wasted) < 0.25 * generated  # rows that have ended leave


def test_what_was_forgotten_is_read_again_and_counted(tiny, watch):
    computed, widths, _ = watch
    config = replace(TINY, rollout_rows=3, max_total_tokens=40)
    writer = Writer(tiny, config)
    rollout(writer, TINY_QUESTIONS, config, ECHO, seed=1)
    times = [n for (segment, _), n in computed.items() if segment.author != "policy"]
    assert writer.prefill_tokens == sum(times) > 1.3 * len(times) and max(widths) == 3
    assert sum(len(kv[0]) for kv in writer.kv.values()) <= 3 * 40


def test_a_call_takes_as_many_passes_as_its_longest_segment(tiny, monkeypatch):
    """The first k tokens, those of the forks, and what is then left of the longest one."""
    write, taken = Writer.write, {True: [], False: []}  # begins: their first tokens

    def counted(self, drafts, limit, begins):
        before, had = self.decode_steps, [len(draft.token_ids) for draft in drafts]
        write(self, drafts, limit, begins)
        new = [len(d.token_ids) - n for d, n in zip(drafts, had, strict=True)]
        taken[begins].append(self.decode_steps - before)
        assert taken[begins][-1] == max(new, default=0)

    monkeypatch.setattr(Writer, "write", counted)
    monkeypatch.setattr(engine.writer, "STEPS", 4)
    config = replace(TINY, initial_rollouts=2, max_segment_tokens=30)
    roll_out(tiny, config, ECHO, TINY_QUESTIONS, seed=1)
    assert max(taken[True]) == 3 < 5 < max(taken[False])
    assert taken[True][0] == 1  # one of the paths reads the question for both


def test_no_more_scores_are_held_than_allowed(tiny, monkeypatch):
    """128 rows of a vocabulary of 152k at 16 steps would be 1.2 GiB."""
    seen, advance = [], Writer.advance
    allowed = 4 * 8 * tiny.vocab_size * 3 + 1  # three steps of eight rows

    def watched(self, drafts, *args, **kwargs):
        seen.append((sum(step.nbytes for step in args[-1]), len(drafts)))
        return advance(self, drafts, *args, **kwargs)

    monkeypatch.setattr(Writer, "advance", watched)
    config = replace(TINY, entropy_tokens=7, rollout_rows=8, initial_rollouts=8)
    for most in (allowed, 1):  # one step is always taken
        monkeypatch.setattr(engine.writer, "SCORES_BYTES", most)
        assert_true_to_the_model(tiny, roll_out(tiny, config, ECHO, TINY_QUESTIONS[:1]), config)
        assert (max(held for held, _ in seen) <= allowed) and (allowed - 1, 8) in seen
    assert seen[-1][0] == 4 * seen[-1][1] * tiny.vocab_size


def test_only_paths_that_go_on_are_kept(tiny, monkeypatch):
    """What others may start from, and what is open: not the paths that ended, however they did."""
    finish, each, taken = Writer.finish, 2 * 2 * 16 * 4, []  # bytes: layers, K and V, float32

    def watched(self, drafts, places):
        finish(self, drafts, places)
        assert set(places) <= {segment for segment in self.kv if segment.author == "prompt"}
        assert set(self.kv) == {*places} | {draft for draft in drafts if draft.stop == "tool"}
        storages = [x.untyped_storage() for kv in self.kv.values() for x in kv]
        alive = {storage.data_ptr(): storage.nbytes() for storage in storages}  # a view keeps all
        taken.append(sum(alive.values()) / each / max(1, sum(s.depth() for s in self.kv)))

    monkeypatch.setattr(Writer, "finish", watched)
    roll_out(tiny, replace(TINY, max_segment_tokens=30), ECHO, TINY_QUESTIONS)
    assert len(taken) > 1 and max(taken) < 1.5


def test_the_cache_is_gone_before_the_update(tiny, monkeypatch):
    """Also of paths that end with a call too many, which the writer keeps."""
    config = replace(TINY, max_tool_calls=1)
    writer = Writer(tiny, config)
    monkeypatch.setattr(arpo_mini, "Writer", lambda policy, config: writer)
    monkeypatch.setattr(arpo_mini, "update", lambda *args: {"cached": len(writer.kv)})
    figures, *_ = arpo_mini.train_step(tiny, None, TINY_QUESTIONS, config, ECHO, 1)
    assert figures["cached"] == 0 < figures["prefill_tokens"]


@pytest.fixture
def scripted(monkeypatch):
    """Tokens and entropies come from the place in the tree alone, whatever is written beside it."""
    places, born = {}, Counter()
    script = [1, 2, 3, 9, 40, 41, 42, 43]

    def segment(author, token_ids, parent):
        new = Segment(author, token_ids, parent=parent)
        born[parent] += 1
        places[new] = (places.get(parent.parent, parent.token_ids), born[parent])
        return new

    def generate(writer, drafts, limit, begins):
        assert 0 < len(drafts) <= writer.config.rollout_rows
        for draft in drafts:
            draw = random.Random(f"{places[draft]} {len(draft.token_ids)}")
            draft.token_ids.append(draw.choice(script))
            draft.token_entropy.append(draw.random())
            full = len(draft.token_ids) >= writer.config.max_segment_tokens
            draft.stop = writer.policy.why_ended(draft.token_ids) or ("length" if full else None)

    monkeypatch.setattr(engine.writer, "Segment", segment)
    monkeypatch.setattr(Writer, "generate", generate)
    return script


@pytest.mark.parametrize("rule", RULES)
def test_how_much_is_computed_at_once_decides_nothing(tiny, scripted, rule):
    config = replace(TINY, branch_rule=rule, entropy_sigma=0.3, initial_rollouts=2, max_branches=1)
    if rule == "threshold":
        config = replace(config, entropy_threshold=0.0, max_branches=9)
    config, found = replace(config, max_tool_calls=6), []
    for rows in (128, 3):
        few = replace(config, rollout_rows=rows)
        groups = [roll_out(tiny, few, ECHO, TINY_QUESTIONS * 2, seed) for seed in range(2)]
        found.append([sorted(map(str, trees(some))) for some in groups])
        assert (granted(groups[0]) > 1) == (rule != "none")
    assert found[0] == found[1]
    assert rule not in ("official", "random") or found[0][0] != found[0][1]  # but a draw does


@pytest.mark.parametrize("rule", [pytest.param("none", marks=pytest.mark.slow), "random"])
def test_a_thousand_rollouts_one_at_a_time_and_as_many_calls_as_are_legal(tiny, scripted, rule):
    """Also where the rest of the paths begin only after the first has made all its calls."""
    config = replace(TINY, group_size=1000, rollout_rows=1, branch_probability=1.0)
    (leaves,) = roll_out(tiny, replace(config, branch_rule=rule), ECHO, TINY_QUESTIONS[:1])
    assert len(set(leaves)) == 1000
    (most,) = (f.metadata["high"] for f in fields(Config) if f.name == "max_tool_calls")
    scripted[:] = [1]
    config = replace(TINY, max_tool_calls=most, max_total_tokens=10_000, group_size=2)
    (leaves,) = roll_out(tiny, replace(config, branch_rule="none"), ECHO, TINY_QUESTIONS[:1])
    calls = [sum(segment.author == "tool" for segment in leaf.path()) for leaf in leaves]
    assert calls == [most, most]


def test_limits_of_segments_and_trajectories_end_a_path(tiny, monkeypatch):
    segments = policy_segments(roll_out(tiny, TINY, ECHO, TINY_QUESTIONS))
    assert max(len(segment.token_ids) for segment in segments) == TINY.max_segment_tokens
    for most in (14, 16):  # a result that leaves no room to answer is dropped
        monkeypatch.setattr(tiny, "context", most if most == 16 else math.inf)  # of the model
        config = replace(TINY, max_total_tokens=14 if most == 14 else 500)
        (*leaves,) = itertools.chain(*roll_out(tiny, config, ECHO, TINY_QUESTIONS, most))
        assert all(leaf.author == "policy" and leaf.depth() <= most for leaf in leaves)
        assert {leaf.depth() == most for leaf in leaves if leaf.stop == "length"} == {True, False}
        calls = [sum(s.author == "tool" for s in leaf.path()) for leaf in leaves]
        assert all(n == 3 or leaf.stop != "tool" for n, leaf in zip(calls, leaves, strict=True))
