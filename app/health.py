"""What a training log should say in words: how a run goes wrong, and what to try then.

Pure functions over the metrics of the steps so far (the dicts of metrics.jsonl, oldest first).
"""

from __future__ import annotations

from collections.abc import Iterator

WINDOW = 5  # steps looked at together: one odd step is no trend
COLLAPSE = 0.1  # of the entropy at the beginning; the default run comes down to a tenth at its end
DEAD_STEPS = 3  # in a row: a single one is chance, and costs no more than its rollout
CLIPPED = 0.3  # share of the tokens; above it a step is mostly work that the clip throws away
DRIFT = 0.05  # nats; rounding makes far less, and the clip acts at a ratio of 1.2, 0.18 nats
SOLVED = 0.9  # accuracy from which a certain policy and equal rewards are what one wants
SHORT = 0.1  # share of the trajectories: they all score -1, and nothing else makes so many


def remarks(history: list[dict]) -> list[str]:
    """What the newest of these steps needs to have said about it, alarms last."""
    return [*notes(history[-1]), *alarms(history)]


def notes(m: dict) -> Iterator[str]:
    """What needs words in one step."""
    equal, groups = m["equal_groups"], m["groups"]
    if equal > groups / 2:
        which = f"all {groups}" if equal == groups else f"{equal} of {groups}"
        yield f"{which} groups had identical rewards: no gradient from them"
    if m.get("skipped_updates"):
        yield f"{m['skipped_updates']} updates skipped: a gradient overflowed, its scale is halved"
    if m["well_formed"] < 0.5:
        yield f"only {m['well_formed']:.0%} of the trajectories are well-formed: the rest score -1"


def alarms(history: list[dict]) -> Iterator[str]:
    """What is going wrong over several steps, each with what to try."""
    begun, now = average(history[:WINDOW], "entropy"), average(history[-WINDOW:], "entropy")
    solved = average(history[-WINDOW:], "accuracy") >= SOLVED
    if len(history) > WINDOW and now < COLLAPSE * begun and not solved:
        yield (
            f"entropy collapse: {now:.4f} nats a token, {begun:.4f} at the beginning. "
            "Try a lower --learning_rate, a higher --clip_high or some --kl_coefficient"
        )
    last = history[-DEAD_STEPS:]
    dead = all(m["equal_groups"] == m["groups"] for m in last)
    if len(last) == DEAD_STEPS and dead and not solved:
        yield (
            f"every group dead for {DEAD_STEPS} steps: nothing is learnt. Try questions that are "
            "neither too easy nor too hard, a larger --group_size or a higher --temperature"
        )
    clipped = average(history[-WINDOW:], "clip_fraction")
    if clipped > CLIPPED:
        yield (
            f"{clipped:.0%} of the tokens are clipped. "
            "Try fewer --updates_per_rollout or a lower --learning_rate"
        )
    drift = history[-1]["drift_mean"]
    if drift is not None and drift > DRIFT:
        yield (
            f"the sampler's log-probs are {drift:.2f} off the trainer's on average (at most "
            f"{history[-1]['drift_max']:.2f}): it does not sample from the policy it trains. "
            "Try --load_in_4bit false, or another version of transformers or of the model"
        )
    short = average(history[-WINDOW:], "short_answers")
    if short > SHORT:
        yield (
            f"{short:.0%} of the answers are shorter than the format needs. Try a lower "
            "--learning_rate, some --kl_coefficient or an --adapter that knows the format"
        )


def average(history: list[dict], key: str) -> float:
    return sum(m[key] for m in history) / len(history)
