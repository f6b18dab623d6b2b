"""The report page: what it says of a known run; that it works in a browser, and stays harmless.

tests/run is a training of three steps (a question each, four trajectories, two updates a rollout):
train --steps 3 --questions_per_step 1 --group_size 4 --record_every 1 --updates_per_rollout 2,
evaluated on three questions. Its third tree has 23 segments, 4 leaves and 2 forks.
"""

import base64
import gzip
import hashlib
import json
import random
import re
import shutil
from pathlib import Path

import pytest
from browser import Browser
from conftest import lines_of
from scripted import main

from app.page.curves import nice_ticks, thinned
from app.page.page import Run, page
from app.page.read import LOGS
from app.page.trees import action_start, answer, fork_data, tree, visible

RUN = Path(__file__).parent / "run"
HOSTILE = '<script>window.pwned = 1</script><!-- "><img src=x onerror="window.pwned = 1"> </script>'


CONFIG = json.loads((RUN / "config.json").read_text())
TREES = lines_of(RUN, "rollouts.jsonl")


def text_of(node):
    return "".join(node["tokens"])


def path_to(record, leaf):
    """The nodes of a trajectory, root first."""
    nodes, at = [], record["leaves"][leaf]["node"]
    while at is not None:
        nodes.insert(0, record["nodes"][at])
        at = record["nodes"][at]["parent"]
    return nodes


@pytest.fixture
def run_folder(tmp_path):
    return Path(shutil.copytree(RUN, tmp_path / "small"))


def report(*folders, **flags):
    args = [str(folder) for folder in folders]
    for name, value in flags.items():
        args += [f"--{name}", str(value)]
    assert main("report", *args) == 0
    written = Path(flags.get("html", folders[0] / "report.html"))
    return written.read_text(encoding="utf-8")


def data_in(text):
    packed = re.search(r'id="data">([^<]*)<', text)[1]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


# ---- what is written -----------------------------------------------------------------------


def test_a_page_holds_table_curves_trees_and_settings(run_folder):
    text = report(run_folder)
    for words in ("Before and after", "deep_search", "66.7%", "21%–94%", "tool calls a question"):
        assert words in text
    for chart in ("Reward", "Right answers", "Entropy before", "Forks", "Tool calls", "Clip"):
        assert f"<h3>{chart}" in text
    for key, value in CONFIG.items():
        assert f'<th scope="row">{key}</th><td><bdi>{value}</bdi></td>' in text
    data = data_in(text)
    assert data["curves"]["steps"] == [1, 2, 3]
    rewards = [row["reward"] for row in lines_of(RUN, "metrics.jsonl")]
    assert data["curves"]["charts"][0][0]["values"] == rewards
    (run,) = data["runs"]
    assert [len(t["nodes"]) for t in run["trees"]] == [9, 9, 23]
    for drawn, record in zip(run["trees"], TREES, strict=True):
        assert [node["tokens"] for node in drawn["nodes"]] == [n["tokens"] for n in record["nodes"]]
        assert [leaf["reward"] for leaf in drawn["leaves"]] == [
            leaf["total"] for leaf in record["leaves"]
        ]


def test_it_is_one_file_that_may_load_and_run_nothing_else(run_folder):
    text = report(run_folder)
    assert not re.search(r"<(link|img|iframe|object|embed|base)\b", text)
    assert not re.search(r"\b(src|href|action)=(?!\"#)", text) and "@import" not in text
    assert "url(" not in text and "innerHTML" not in text and "eval(" not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("style", "script"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_runs_are_laid_over_each_other(run_folder, tmp_path):
    other = shutil.copytree(run_folder, tmp_path / "other")
    config = CONFIG | {"branch_rule": "random"}
    (other / "config.json").write_text(json.dumps(config))
    text = report(run_folder, other, html=tmp_path / "both.html")
    assert "arpo_mini: small, other" in text
    assert [run["name"] for run in data_in(text)["runs"]] == ["small", "other"]
    assert text.count('class="line run1"') >= len("rewafc")  # a curve in every chart
    assert re.findall(r'class="differs"><th scope="row">(\w+)', text) == ["branch_rule"]


def test_runs_of_one_name_are_told_apart(run_folder, tmp_path):
    other = tmp_path / "elsewhere" / "small"
    shutil.copytree(run_folder, other)
    data = data_in(report(run_folder, other, html=tmp_path / "both.html"))
    expected = [f"{run_folder.parent.name}/small", "elsewhere/small"]
    assert [run["name"] for run in data["runs"]] == expected


@pytest.mark.parametrize(
    ("rule", "figures", "words"),
    [
        ("paper", (0.03, 0.01, 0.02, 0.504, 1, 1), "P = 0.5 + 0.2 × gain > τ = 0.5"),
        ("paper", (0.01, 0.03, -0.02, 0.496, 0, 0), "P = 0.5 + 0.2 × gain ≤ τ = 0.5"),
        ("official", (0.03, 0.01, 0.02, 0.504, 1, 0), "the dice said yes"),
        ("adaptive", (0.03, 0.01, 0.01, 1.0, 2, 2), "H > mean + 1.5 σ"),
        ("random", (0.03, 0.01, 0.02, 0.5, 0, 0), "whatever H is, and the dice said no"),
        ("none", (0.03, 0.01, 0.02, 0.0, 0, 0), "never forks"),
    ],
)
def test_a_decision_in_words(rule, figures, words):
    names = ("H", "H_initial", "gain", "probability", "forks", "granted")
    decision = dict(zip(names, figures, strict=True))
    fork = fork_data(decision, CONFIG | {"branch_rule": rule})
    assert words in fork["rule"] and fork["rule"] in fork["story"]
    assert fork["H"] == f"{decision['H']:.4f}"
    assert fork["gain"] == f"{decision['gain']:+.4f}".replace("-", "−")
    outcome = {0: "No fork", 1: "Fork: 1 more path starts", 2: "Fork: 2 more paths start"}
    if decision["forks"] > decision["granted"]:
        assert "wanted" in fork["outcome"] and "wanted" in fork["story"]
    else:
        assert fork["outcome"].startswith(outcome[decision["granted"]])
    if rule == "paper":
        assert ("less sure" if decision["gain"] > 0 else "surer") in fork["story"]


def test_the_path_that_was_measured_goes_straight_on_and_forks_bend_off():
    drawn = tree(TREES[2], CONFIG)
    forked = [
        i
        for i, node in enumerate(drawn["nodes"])
        if i and drawn["nodes"][node["parent"]]["fork"] and not node["goes_on"]
    ]
    assert forked == [11, 16]
    assert [node["below"] for node in drawn["nodes"][:6]] == [
        [0, 1, 2, 3], [0, 3], [0, 3], [0], [1, 2], [1, 2],
    ]  # fmt: skip


def test_a_call_is_found_where_tags_are_split_over_tokens():
    assert action_start(["<think>a <b>", "</think", "><sea", "rch>x", "</search", ">"]) == 2
    assert action_start(["<think>so</think>", "<answer>", "\\boxed{5}</answer>"]) == 1
    assert action_start(["<think>no call at all"]) is None
    assert answer("<think>x</think><answer> \\boxed{7} </answer>") == "7"
    assert answer("<answer>it is \\boxed{7}</answer>") == "it is \\boxed{7}"
    assert answer("<think>x") is None


def test_what_would_act_unseen_is_shown():
    assert visible("a\n\t\x00\u202e\ud800é") == "a\n\t\\u{0}\\u{202e}\\u{d800}é"


def test_numbers_that_are_none_leave_a_gap():
    metrics = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": float("nan"), "accuracy": "x"}]
    metrics.append({"step": 3, "reward": 10**400, "accuracy": True})
    data = data_in(page("t", [Run("a", CONFIG, metrics)]))
    assert data["curves"]["charts"][0][0]["values"] == [0.5, None, None]
    assert data["curves"]["charts"][1][0]["values"] == [None, None, None]


def test_axes_enclose_the_values_and_thinning_keeps_the_peaks():
    for values in ([0.0], [0.3, 1.1], [-1.0, 0.2], [3.0, 41.0], [1e-5, 2e-4]):
        ticks = nice_ticks(values, ".2f")
        assert ticks[0] <= min(values) and max(values) <= ticks[-1] and 2 <= len(ticks) <= 8
    points = [(x, 9.0 if x == 5_001 else x % 7 / 7) for x in range(20_000)]
    few = thinned(points)
    assert len(few) <= 1000 and (5_001, 9.0) in few and few == sorted(few)


# ---- runs that are not whole ---------------------------------------------------------------


def test_a_run_that_has_just_begun(run_folder, capsys):
    for name in LOGS:
        (run_folder / name).unlink()
    assert "no training step has been logged yet" in report(run_folder)


def test_a_line_that_is_still_being_written_is_left_out_and_said(run_folder):
    for name in LOGS:
        whole = (run_folder / name).read_text()
        (run_folder / name).write_text(whole[: len(whole) - 40])
    text = report(run_folder)
    data = data_in(text)
    assert data["curves"]["steps"] == [1, 2] and len(data["runs"][0]["trees"]) == 2
    for name in LOGS:
        assert f"The last line of {name} is not complete" in text


def test_a_run_that_was_stopped_before_its_last_evaluation(run_folder):
    path = run_folder / "evaluations.jsonl"
    rows = lines_of(run_folder, "evaluations.jsonl")
    partial = [row | {"step": 2, "questions": 2} for row in rows[:2]]
    for kept, words in ((rows[:2], "not evaluated since step 0"), ([], "not evaluated yet"),
                        (rows[:2] + partial, "at step 2, on 2 questions only")):  # fmt: skip
        path.write_text("".join(json.dumps(row) + "\n" for row in kept))
        assert words in report(run_folder)


def broken(name, text):
    def breaks(folder):
        (folder / name).write_text(text)

    return breaks


def broken_tree(**changes):
    record = json.loads(json.dumps(TREES[0]))
    for key, value in changes.items():
        place, _, field = key.partition("__")
        record[place][-1][field] = value
    return broken("rollouts.jsonl", json.dumps(TREES[0]) + "\n" + json.dumps(record) + "\n")


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        (shutil.rmtree, "no such folder"),
        (lambda f: [p.unlink() for p in f.iterdir()], "holds no config.json"),
        (broken("config.json", '{"steps": '), "config.json: no JSON"),
        (broken("config.json", "[1]"), "config.json: it must be an object"),
        (broken("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 3}\n'), "metrics.jsonl, line 2"),
        (broken("metrics.jsonl", '{"reward": 1}\n'), "metrics.jsonl, line 1: step is missing"),
        (broken("metrics.jsonl", '{"step": "x"}\n'), "metrics.jsonl, line 1: step 'x': it must be"),
        (broken("metrics.jsonl", '{"step": 1e999}\n'), "metrics.jsonl, line 1: step inf"),
        (broken("evaluations.jsonl", '{"step": 0}\n'), "line 1: decoding"),
        (broken("evaluations.jsonl", '{"step": 0, "decoding": "greedy", "questions": 1, '
         '"accuracy": 1, "domains": {"a": 3}}\n'), "line 1: domains {'a': 3}"),
        (broken_tree(nodes__parent=99), "line 2: no rollout tree: node 8: its parent is 99"),
        (broken_tree(nodes__parent=8), "node 8: its parent is 8"),
        (broken_tree(nodes__tokens=["a", 3]), "node 8: tokens must be a list of texts"),
        (broken_tree(nodes__token_entropy=[0.1]), "1 entropies"),
        (broken_tree(nodes__author="nobody"), "author 'nobody'"),
        (broken_tree(leaves__node=9), "a leaf stands at node 9 of 9"),
        (broken("rollouts.jsonl", '{"step": 1, "question": "", "nodes": 3, "leaves": 0}\n'),
         "line 1: no rollout tree"),
    ],
)  # fmt: skip
def test_what_is_no_run_is_one_line_and_exit_code_2(breaks, words, run_folder, capsys):
    breaks(run_folder)
    assert main("report", run_folder) == 2
    out, error = capsys.readouterr()
    assert out == "" and len(error.strip().splitlines()) == 1
    assert words in error and str(run_folder) in error
    assert not (run_folder / "report.html").exists()


@pytest.mark.slow
def test_any_value_may_be_of_any_kind(tmp_path, capsys):
    """A page, or one line and exit code 2; never an exception."""
    rng = random.Random(0)
    odd = [None, -1, 0, 1e999, float("nan"), 10**400, "x", "", [], [1], {}, {"a": 1}, True]
    ends = set()
    for case in range(300):
        folder = Path(shutil.copytree(RUN, tmp_path / str(case)))
        name = rng.choice(["config.json", *LOGS])
        rows = lines_of(RUN, name) if name.endswith("l") else [CONFIG | {}]
        for _ in range(rng.randint(1, 3)):
            at = rng.choice(rows)
            while True:  # a random way down to a value
                key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
                if not (isinstance(at[key], dict | list) and at[key] and rng.random() < 0.7):
                    break
                at = at[key]
            at[key] = rng.choice(odd)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        code = main("report", folder)
        assert code in (0, 2) and len(capsys.readouterr().err.splitlines()) == code // 2
        ends.add(code)
        shutil.rmtree(folder)
    assert ends == {0, 2}


# ---- hostile text --------------------------------------------------------------------------


def hostile_run():
    """The third tree, with markup and odd characters wherever a text comes from outside."""
    record = json.loads(json.dumps(TREES[2]))
    odd = HOSTILE + "\u2028\u202e\x00\ud800"
    record.update(question=odd, answers=[odd], domain=odd)
    for node in record["nodes"]:
        node["tokens"][0] = odd
    record["nodes"][3]["tokens"][-1] = f"<answer>{odd}</answer>"
    figures = lines_of(RUN, "evaluations.jsonl")[0]
    figures["domains"] = {odd: figures["domains"]["math"]}
    config = CONFIG | {"model_name": odd}
    drawn = tree(record, config)
    return Run(odd, config, lines_of(RUN, "metrics.jsonl"), [figures], [drawn], [odd])


def test_hostile_text_never_stands_in_the_page_as_markup():
    run = hostile_run()
    text = page(run.name, [run, run])
    assert text.count("<script") == 2 and text.count("</script>") == 2 and "<img" not in text
    assert "<!--" not in text and not set("\u2028\u202e\x00\ud800") & set(text)


# ---- in the browser ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def tab(browser):
    """A browser at rest; afterwards nothing was complained of and nothing fetched but the page."""
    browser.look(1280, 720)
    yield browser
    assert browser.js("document.readyState") == "complete"
    assert browser.errors == []
    assert all(url.startswith(("file:", "about:")) for url in browser.requests)
    assert len(browser.requests) <= 1


@pytest.fixture
def page_path(run_folder):
    report(run_folder)
    return run_folder / "report.html"


def shade(tab, node, token):
    """Opacity of what lies behind a token, and its colour."""
    colour = tab.js(
        f"getComputedStyle(document.querySelectorAll('[data-node=\"{node}\"] .t')[{token}])"
        ".backgroundColor"
    )
    *rgb, alpha = re.findall(r"[\d.]+", colour) + ["1"] * colour.startswith("rgb(")
    return float(alpha), [float(c) for c in rgb[:3]]


@pytest.mark.slow
def test_the_tree_of_a_known_run(tab, page_path):
    tab.open(page_path, "#step=3")
    record = TREES[2]
    count = "document.querySelectorAll('#tree {}').length"
    assert tab.js(count.format(".seg")) == len(record["nodes"]) == 23
    assert tab.js(count.format(".leaf")) == len(record["leaves"]) == 4
    assert tab.js(count.format(".decision.granted")) == tab.js(count.format(".forked")) == 2
    for i, node in enumerate(record["nodes"]):
        box = f"[data-node='{i}']"
        shown = "".join(tab.texts(f"{box} > .text"))
        assert shown == (text_of(node) if i else record["question"])
        parent = tab.js(f'document.querySelector("{box}").up?.dataset.node ?? null')
        assert parent == (None if node["parent"] is None else str(node["parent"]))
        if node["decision"]:
            figures = tab.texts(f"{box} dd")
            decision = node["decision"]
            shown = [f"{decision[name]:.4f}" for name in ("H", "H_initial", "gain", "probability")]
            assert [text.removeprefix("+") for text in figures] == shown
            assert "P = 0.5 + 0.2 × gain > τ = 0.5" in tab.texts(f"{box} .decision p")
    corners = tab.js(
        "[...Array(23).keys()].map((i) => document.querySelector(`[data-node='${i}']`))"
        ".map((e) => e.getBoundingClientRect()).map((b) => [b.left, b.right, b.top, b.bottom])"
    )
    for (left, _, top, _), node in list(zip(corners, record["nodes"], strict=True))[1:]:
        parent = corners[node["parent"]]
        if node["author"] == "tool":  # a result stands under its call,
            assert left == parent[0] and abs(top - parent[3]) < 1
        else:  # and what follows it to the right, its forks below
            assert parent[1] < left < parent[1] + 40
    assert corners[3][2] < corners[16][2] and corners[6][2] < corners[11][2]
    for i, leaf in enumerate(record["leaves"]):
        (text,) = tab.texts(f"[data-leaf='{i}']")
        sign = "+" if leaf["advantage"] > 0 else "−"
        assert f"trajectory {i + 1}" in text and f"reward {leaf['total']:g}" in text
        assert f"A {sign}{abs(leaf['advantage']):.2f}" in text
        assert ("right" if leaf["accuracy"] == 1 else "wrong") in text
    dots = "[data-node='4'] .dot"
    assert tab.js(f"[...document.querySelectorAll(\"{dots}\")].map((d) => d.className)") == [
        "dot", "dot on", "dot on", "dot",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_switch_changes_the_shading(tab, page_path):
    tab.open(page_path, "#step=3")
    H = TREES[2]["nodes"][20]["token_entropy"]
    order = sorted(range(len(H)), key=H.__getitem__)
    low, high = shade(tab, 20, order[0]), shade(tab, 20, order[-1])
    assert low[0] < 0.05 < 0.3 < high[0]
    assert shade(tab, 21, 3)[0] == 0  # a tool result has no entropy
    tab.click("[value=advantage]")
    up, down = shade(tab, 15, 3), shade(tab, 22, 3)  # A +1.5 and -0.5
    assert up[0] > down[0] > 0.1 and shade(tab, 22, 0) == down
    assert up[1][2] > up[1][0] and down[1][0] > down[1][2]  # blue, orange
    assert shade(tab, 21, 3)[0] == 0
    tab.click("[value=entropy]")
    assert shade(tab, 20, order[-1]) == high


@pytest.mark.slow
def test_a_click_follows_a_trajectory_with_its_loss_mask(tab, page_path):
    tab.open(page_path, "#step=3")
    assert not tab.js("document.querySelector('#panel').checkVisibility()")
    tab.click("[data-leaf='2']")
    path = path_to(TREES[2], 2)
    assert tab.js("document.querySelector('#panel').checkVisibility()")
    assert tab.texts("#chosen pre") == [text_of(node) for node in path]
    trained = [node for node in path if node["author"] == "policy"]
    assert tab.texts("#chosen .trained pre") == [text_of(node) for node in trained]
    masks = [side.partition("mask ")[2][:1] for side in tab.texts("#chosen .side")]
    assert masks == ["1" if node["author"] == "policy" else "0" for node in path]
    underlined = tab.js(
        "[...document.querySelectorAll('#chosen .t')]"
        ".filter((t) => getComputedStyle(t).borderBottomStyle === 'solid').length"
    )
    assert underlined == sum(len(node["tokens"]) for node in trained)
    count = f"the {underlined} underlined tokens of {sum(len(node['tokens']) for node in path)}"
    assert count in tab.texts("#chosen")[0] and "advantage +1.50" in tab.texts("#chosen")[0]
    assert len(tab.texts(".on-path")) == len(path) + 1
    tab.click("#close")
    assert not tab.js("document.querySelector('#panel').checkVisibility()")


@pytest.mark.slow
def test_a_shared_segment_shows_who_shares_it(tab, page_path):
    tab.open(page_path, "#step=3")
    tab.click("[data-node='4']")
    rows = tab.js(
        "[...document.querySelectorAll('.shares tr')]"
        ".map((row) => [...row.cells].map((c) => c.textContent))"
    )
    assert rows[1:] == [
        ["trajectory 2", "−0.50", "+0.50", "−0.50"],
        ["trajectory 3", "+1.50", "+0.50", "+1.50"],
        ["sum", "+1.00", "+1.00", "+1.00"],
    ]
    tab.click("[data-node='2']")
    (text,) = tab.texts("#chosen")
    assert "The first 10 tokens written after this result have entropy H = 0.0069" in text


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(tab, page_path):
    tab.open(page_path, "#step=3")
    focus = "document.activeElement.dataset.node ?? 'leaf ' + document.activeElement.dataset.leaf"
    tab.js("document.querySelector('#tree [tabindex=\"0\"]').focus()")
    seen = [tab.js(focus)]
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown"):
        tab.press(key)
        seen.append(tab.js(focus))
    assert seen == ["0", "1", "2", "3", "leaf 0", "3", "leaf 0"]
    outline = tab.js("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    tab.press("Enter")
    assert tab.texts("#chosen pre") == [text_of(node) for node in path_to(TREES[2], 0)]
    assert tab.js("document.activeElement.ariaSelected") == "true"
    tab.press("Escape")
    assert not tab.js("document.querySelector('#panel').checkVisibility()")
    tab.press("End")
    assert tab.js(
        "document.activeElement === [...document.querySelectorAll('[role=treeitem]')].at(-1)"
    )
    tab.js("document.querySelector('#step').focus()")
    tab.press("ArrowLeft")
    assert tab.texts("#at") == ["2"] and tab.js("document.querySelectorAll('.seg').length") == 9
    tab.js("document.querySelector('.plot').focus()")
    tab.press("Home")
    assert tab.texts("#readout0") == ["step 1 0.75"]


@pytest.mark.slow
def test_hover_gives_values_in_every_curve(tab, run_folder, tmp_path):
    report(run_folder, RUN, html=tmp_path / "two.html")
    tab.open(tmp_path / "two.html")
    tab.mouse("mouseMoved", ".plot[data-chart='2']", across=0.95)
    last = lines_of(RUN, "metrics.jsonl")[2]
    assert tab.texts("#readout2")[0].count(f"{last['entropy_after_tool']:.4f}") == 2
    assert tab.texts("#readout0")[0].startswith("step 3")
    assert "small" in tab.texts("#readout0")[0]
    assert f"{last['reward']:.2f}" in tab.texts("#readout0")[0]
    tab.mouse("mouseMoved", ".plot[data-chart='2']", across=0.12)
    assert tab.texts("#readout0")[0].startswith("step 1")


@pytest.mark.slow
def test_every_recorded_tree_can_be_reached(tab, run_folder, tmp_path):
    second = shutil.copytree(run_folder, tmp_path / "second")
    lines = (second / "rollouts.jsonl").read_text().replace('{"step": 1', '{"step": 2')
    (second / "rollouts.jsonl").write_text(lines)
    report(run_folder, second, html=tmp_path / "two.html")
    tab.open(tmp_path / "two.html")
    pick = (
        "(() => {{ const s = document.querySelector('#{0}'); s.value = {1};"
        "s.dispatchEvent(new Event('{2}')); }})()"
    )
    tab.js(pick.format("run", 1, "change"))
    assert tab.js("[...document.querySelector('#question').options].length") == 2
    tab.js(pick.format("question", 1, "change"))
    assert tab.texts("[data-node='0'] .text") == [TREES[1]["question"]]
    tab.js(pick.format("step", 1, "input"))
    assert tab.texts("[data-node='0'] .text") == [TREES[2]["question"]]


@pytest.mark.slow
def test_a_hostile_rollout_runs_nothing(tab, tmp_path):
    run = hostile_run()
    path = tmp_path / "page.html"
    path.write_text(page(run.name, [run, run]), encoding="utf-8", errors="replace")
    tab.open(path)
    for i in range(4):
        tab.click(f"[data-leaf='{i}']")
    for i in range(23):
        tab.click(f"[data-node='{i}']")
    tab.mouse("mouseMoved", ".plot", across=0.5)
    tab.js("new Promise((done) => setTimeout(done, 200))")
    assert tab.js("window.pwned") is None
    assert tab.js("document.querySelectorAll('img, #tree script, #panel script').length") == 0
    assert tab.js("document.scripts.length") == 2
    assert HOSTILE in tab.texts("[data-node='1'] .text")[0]
    assert HOSTILE in tab.texts("h1")[0]
    assert "\\u{202e}\\u{0}\\u{d800}" in tab.texts("[data-node='1'] .text")[0]


@pytest.mark.slow
@pytest.mark.parametrize("width", [390, 1280, 1920])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_the_window_and_can_be_read(tab, page_path, width, scheme):
    tab.look(width, 720, scheme)
    tab.open(page_path, "#step=3&leaf=2&shade=advantage")
    assert tab.js("document.documentElement.scrollWidth") <= width
    for by in ("advantage", "entropy"):
        tab.js(f"document.querySelector('[value={by}]').click()")
        for selector in "p,.note,th,td,td *,.leaf p,.seg .t,.head,.decision p,.row .t".split(","):
            assert lowest_contrast(tab, selector) >= 4.5, (by, selector)


def lowest_contrast(tab, selector):
    """The smallest contrast ratio of a text to what lies behind it (WCAG 2.1, 1.4.3)."""
    layers = tab.js(f"""[...document.querySelectorAll({json.dumps(selector)})]
        .filter((e) => !e.closest(".following :is(.seg, .leaf):not(.on-path)"))
        .filter((e) => e.checkVisibility())
        .map((e) => {{
            const found = [getComputedStyle(e).color];
            for (let at = e; at; at = at.parentElement)
                found.push(getComputedStyle(at).backgroundColor);
            return found;
        }})""")
    assert layers

    def rgba(colour):
        parts = [float(x) for x in re.findall(r"[\d.]+", colour)]
        return parts[:3], [*parts, 1.0][3]

    def luminance(rgb):
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    ratios = []
    for text, *behind in layers:
        under = [255.0] * 3
        for colour in reversed(behind):
            rgb, alpha = rgba(colour)
            under = [alpha * a + (1 - alpha) * b for a, b in zip(rgb, under, strict=True)]
        both = [luminance([c / 255 for c in x]) for x in (rgba(text)[0], under)]
        dark, light = sorted(both)
        ratios.append((light + 0.05) / (dark + 0.05))
    return min(ratios)


@pytest.mark.slow
def test_print_shows_everything_without_controls(tab, page_path):
    tab.look(1100, 800, media="print")
    tab.open(page_path, "#step=3")
    tab.js("dispatchEvent(new Event('beforeprint'))")
    assert tab.js("document.querySelector('#settings details').open")
    assert not tab.js("document.querySelector('#controls').checkVisibility()")
    assert tab.js("document.querySelectorAll('.settings tr').length") == len(CONFIG) + 1
