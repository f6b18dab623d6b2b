"""What the log says in words: each alarm on one side of its threshold and silence on the other."""

import pytest

import app.health as alarms
from app.health import CLIPPED, COLLAPSE, DEAD_STEPS, DRIFT, SHORT, SOLVED, WINDOW, remarks
from app.screen import log_line

HEALTHY = {
    "equal_groups": 3,
    "groups": 8,
    "accuracy": 0.6,
    "well_formed": 0.98,
    "entropy": 0.08,
    "clip_fraction": 0.01,
    "drift_mean": 1e-6,
    "drift_max": 1e-5,
    "short_answers": 0.0,
}


def said(*changes):
    """The remarks on a healthy run whose last steps are changed."""
    steps = [{**HEALTHY, **change} for change in changes]
    return remarks([HEALTHY] * 20 + steps)


def test_a_healthy_run_needs_no_words():
    assert said() == [] and remarks([HEALTHY]) == []


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


@pytest.mark.parametrize("key", ["clip_fraction", "short_answers"])
def test_one_odd_step_is_no_trend(key):
    assert said({key: 0.4}) == []


def test_entropy_is_compared_with_the_first_steps_of_the_run():
    falling = [{**HEALTHY, "entropy": 0.1 * 0.9**step} for step in range(40)]
    first = next(n for n in range(1, 41) if remarks(falling[:n]))
    begun = sum(m["entropy"] for m in falling[:WINDOW]) / WINDOW
    now = sum(m["entropy"] for m in falling[first - WINDOW : first]) / WINDOW
    assert now < COLLAPSE * begun < now / 0.9
    assert f"{now:.4f} nats" in remarks(falling[:first])[0]


def test_dead_groups_are_said_at_once_and_alarm_when_they_stay():
    dead = {"equal_groups": 8}
    assert said(dead) == ["all 8 groups had identical rewards: no gradient from them"]
    assert len(said(*[dead] * (DEAD_STEPS - 1))) == 1
    alarm = said(*[dead] * DEAD_STEPS)[-1]
    assert f"every group dead for {DEAD_STEPS} steps" in alarm and "--group_size" in alarm
    assert len(said(dead, dead, {"equal_groups": 7}, dead)) == 1
    assert len(remarks([{**HEALTHY, **dead}] * (DEAD_STEPS - 1))) == 1


def test_notes_on_one_step():
    assert said({"equal_groups": 5})[0].startswith("5 of 8 groups had identical rewards")
    assert said({"equal_groups": 4}) == []
    assert "only 49% of the trajectories are well-formed" in said({"well_formed": 0.49})[0]


def test_they_stand_below_the_figures_of_their_step():
    figures = {"reward": 0.5, "accuracy": 0.5, "tool_calls": 9, "forks": 3, "clip_fraction": 0.4}
    figures |= {"entropy_initial": 0.1, "entropy_after_tool": None}
    figures |= {"seconds_rollout": 1.0, "seconds_update": 0.5}
    figures |= {"train_tokens": 2000, "train_tokens_unpacked": 3000}
    words = list(alarms.alarms([{**HEALTHY, **figures}]))
    lines = log_line(7, figures, words).splitlines()
    assert len(lines) == 2 and lines[0].lstrip().startswith("7") and "40% of the" in lines[1]


def test_who_has_solved_the_task_may_be_certain():
    certain = {"entropy": 0.0, "equal_groups": 8}
    alarmed = said(*[{**certain, "accuracy": SOLVED - 0.01}] * WINDOW)
    assert len(alarmed) == 3 and "collapse" in alarmed[1] and "dead" in alarmed[2]
    assert len(said(*[{**certain, "accuracy": SOLVED}] * WINDOW)) == 1
