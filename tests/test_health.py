"""What the log says in words: each alarm on one side of its threshold and silence on the other."""

import pytest

from app.health import CLIPPED, COLLAPSE, DEAD_STEPS, DRIFT, SHORT, SOLVED, WINDOW, remarks

HEALTHY = {
    "equal_groups": 3, "groups": 8, "accuracy": 0.6, "well_formed": 0.98, "entropy": 0.08,
    "clip_fraction": 0.01, "drift_mean": 1e-6, "drift_max": 1e-5, "short_answers": 0.0,
}  # fmt: skip
DEAD, CERTAIN = {"equal_groups": 8}, {"entropy": 0.0, "equal_groups": 8}


def said(*changes):
    """The remarks on a healthy run whose last steps are changed."""
    entropies = [0.02, 0.14, 0.05, 0.14, 0.05] + [0.05] * 15  # a mean of 0.08 as it begins
    run = [HEALTHY | {"entropy": entropy} for entropy in entropies]
    return remarks(run + [HEALTHY | change for change in changes])


@pytest.mark.parametrize(
    ("key", "threshold", "steps", "words", "advice"),
    [
        ("entropy", -COLLAPSE * 0.08, WINDOW, "entropy collapse", "--learning_rate"),
        ("clip_fraction", CLIPPED, WINDOW, "tokens are clipped", "--updates_per_rollout"),
        ("short_answers", SHORT, WINDOW, "shorter than the format needs", "--adapter"),
        ("drift_mean", DRIFT, 1, "the sampler's log-probs are", "--load_in_4bit false"),
    ],
)
def test_an_alarm_sounds_beyond_its_threshold_and_not_before(key, threshold, steps, words, advice):
    beyond, before = abs(threshold * 1.01), abs(threshold * 0.99)
    if threshold < 0:  # an alarm for too little
        beyond, before = before, beyond
    assert said(*[{key: before}] * steps) == []
    (alarm,) = said(*[{key: beyond}] * steps)
    assert words in alarm and "Try " in alarm and advice in alarm


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ([{}], []),
        ([{"clip_fraction": 0.4}], []),  # one odd step is no trend
        ([{"entropy": 0.0}] * (WINDOW - 1), []),
        ([{"entropy": 0.0}] * WINDOW, ["entropy collapse: 0.0000 nats a token, 0.0800 at the"]),
        ([{"equal_groups": 4}], []),
        ([{"equal_groups": 5}], ["5 of 8 groups had identical rewards"]),
        ([{"well_formed": 0.49}], ["only 49% of the trajectories are well-formed"]),
        ([{"drift_mean": None}], []),
        ([DEAD] * (DEAD_STEPS - 1), ["all 8 groups had identical rewards: no gradient from them"]),
        ([DEAD] * DEAD_STEPS, ["all 8", f"every group dead for {DEAD_STEPS} steps"]),
        ([DEAD, DEAD, {"equal_groups": 7}, DEAD], ["all 8"]),
        ([CERTAIN | {"accuracy": SOLVED - 0.01}] * WINDOW, ["all 8", "entropy", "every"]),
        ([CERTAIN | {"accuracy": SOLVED}] * WINDOW, ["all 8"]),  # solved: it may be certain
    ],
)
def test_what_is_said_of_some_steps(changes, words):
    remarked = said(*changes)
    assert len(remarked) == len(words)
    assert all(line.startswith(begin) for line, begin in zip(remarked, words, strict=True))
    assert remarks([HEALTHY]) == []  # the first steps are too few for an alarm
