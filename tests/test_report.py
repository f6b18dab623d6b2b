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

from app.page.curves import curve_data, nice_ticks, thinned
from app.page.page import Run, page
from app.page.read import LOGS
from app.page.trees import action_start, answer, fork_data, tree, visible

RUN = Path(__file__).parent / "run"
HOSTILE = '<script>window.pwned = 1</script><!-- "><img src=x onerror="window.pwned = 1"> </script>'


CONFIG = json.loads((RUN / "config.json").read_text())
TREES = lines_of(RUN, "rollouts.jsonl")


def path_to(record, leaf):
    """The texts of a trajectory, root first, and who wrote each."""
    nodes, at = [], record["leaves"][leaf]["node"]
    while at is not None:
        nodes.insert(0, record["nodes"][at])
        at = record["nodes"][at]["parent"]
    return ["".join(node["tokens"]) for node in nodes], [node["author"] for node in nodes]


@pytest.fixture
def run_folder(tmp_path):
    return Path(shutil.copytree(RUN, tmp_path / "small"))


def report(*folders, **flags):
    """The page of some runs, and the data in it."""
    more = [word for name, value in flags.items() for word in (f"--{name}", value)]
    assert main("report", *folders, *more) == 0
    text = Path(flags.get("html", folders[0] / "report.html")).read_text(encoding="utf-8")
    packed = re.search(r'id="data">([^<]*)<', text)[1]
    return text, json.loads(gzip.decompress(base64.b64decode(packed)))


# ---- what is written -----------------------------------------------------------------------


def test_a_page_holds_table_curves_trees_and_settings(run_folder):
    text, data = report(run_folder)
    for words in ("Before and after", "deep_search", "66.7%", "21%–94%", "tool calls a question"):
        assert words in text
    for chart in ("Reward", "Right answers", "Entropy before", "Forks", "Tool calls", "Clip"):
        assert f"<h3>{chart}" in text
    for key, value in CONFIG.items():
        assert f'<th scope="row">{key}</th><td><bdi>{value}</bdi></td>' in text
    assert data["curves"]["steps"] == [1, 2, 3]
    rewards = [row["reward"] for row in lines_of(RUN, "metrics.jsonl")]
    assert data["curves"]["charts"][0][0]["values"] == rewards
    for drawn, record in zip(data["runs"][0]["trees"], TREES, strict=True):
        for part, of_drawn, of_record in (
            ("nodes", "tokens", "tokens"),
            ("leaves", "reward", "total"),
        ):
            assert [x[of_drawn] for x in drawn[part]] == [x[of_record] for x in record[part]]


def test_it_is_one_file_that_may_load_and_run_nothing_else(run_folder):
    text, _ = report(run_folder)
    assert not re.search(r"<(link|img|iframe|object|embed|base)\b", text)
    assert not re.search(r"\b(src|href|action)=(?!\"#)", text) and "@import" not in text
    assert "url(" not in text and "innerHTML" not in text and "eval(" not in text
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)[1]
    assert policy.startswith("default-src 'none'; ") and "unsafe" not in policy
    for tag in ("style", "script"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_runs_are_laid_over_each_other_and_told_apart(run_folder, tmp_path):
    other = shutil.copytree(run_folder, tmp_path / "other")
    (other / "config.json").write_text(json.dumps(CONFIG | {"branch_rule": "random"}))
    text, data = report(run_folder, other, html=tmp_path / "both.html")
    assert "arpo_mini: small, other" in text
    assert [run["name"] for run in data["runs"]] == ["small", "other"]
    assert text.count('class="line run1"') >= len("rewafc")  # a curve in every chart
    assert re.findall(r'class="differs"><th scope="row">(\w+)', text) == ["branch_rule"]
    same = shutil.copytree(run_folder, tmp_path / "elsewhere" / "small")
    _, data = report(run_folder, same, html=tmp_path / "both.html")
    expected = [f"{run_folder.parent.name}/small", "elsewhere/small"]
    assert [run["name"] for run in data["runs"]] == expected


@pytest.mark.parametrize(
    ("rule", "gain", "forks", "granted", "words", "outcome"),
    [
        ("paper", 0.02, 1, 1, "P = 0.5 + 0.2 × gain > τ = 0.5", "Fork: 1 more path starts"),
        ("paper", -0.02, 0, 0, "P = 0.5 + 0.2 × gain ≤ τ = 0.5", "No fork"),
        ("official", 0.02, 1, 0, "the dice said yes", "wanted"),
        ("adaptive", 0.01, 2, 2, "H > mean + 1.5 σ", "Fork: 2 more paths start"),
        ("random", 0.02, 0, 0, "whatever H is, and the dice said no", "No fork"),
        ("none", 0.02, 0, 0, "never forks", "No fork"),
    ],
)
def test_a_decision_in_words(rule, gain, forks, granted, words, outcome):
    decision = {"H": 0.03, "H_initial": 0.01, "gain": gain, "probability": 0.5 + 0.2 * gain}
    decision |= {"forks": forks, "granted": granted}
    fork = fork_data(decision, CONFIG | {"branch_rule": rule})
    assert words in fork["rule"] and fork["rule"] in fork["story"]
    assert fork["H"] == "0.0300" and fork["gain"] == f"{gain:+.4f}".replace("-", "−")
    assert outcome in fork["outcome"]
    assert ("wanted" in fork["story"]) == (forks > granted)
    assert rule != "paper" or ("less sure" if gain > 0 else "surer") in fork["story"]


def test_the_path_that_was_measured_goes_straight_on_and_forks_bend_off():
    nodes = tree(TREES[2], CONFIG)["nodes"]
    read = [(i, node) for i, node in enumerate(nodes) if i and nodes[node["parent"]]["fork"]]
    assert [i for i, node in read if not node["goes_on"]] == [11, 16]
    below = [node["below"] for node in nodes[:6]]
    assert below == [[0, 1, 2, 3], [0, 3], [0, 3], [0], [1, 2], [1, 2]]


def test_a_call_is_found_where_tags_are_split_over_tokens():
    assert action_start(["<think>a <b>", "</think", "><sea", "rch>x", "</search", ">"]) == 2
    assert action_start(["<think>so</think>", "<answer>", "\\boxed{5}</answer>"]) == 1
    assert action_start(["<think>no call at all"]) is None
    assert answer("<think>x</think><answer> \\boxed{7} </answer>") == "7"
    assert answer("<answer>it is \\boxed{7}</answer>") == "it is \\boxed{7}"
    assert answer("<think>x") is None


def test_numbers_that_are_none_leave_a_gap():
    metrics = [{"step": 1, "reward": 0.5}, {"step": 2, "reward": float("nan"), "accuracy": "x"}]
    metrics.append({"step": 3, "reward": 10**400, "accuracy": True})
    charts = curve_data([metrics])["charts"]
    assert [chart[0]["values"] for chart in charts[:2]] == [[0.5, None, None], [None, None, None]]


def test_axes_enclose_the_values_and_thinning_keeps_the_peaks():
    for values in ([0.0], [0.3, 1.1], [-1.0, 0.2], [3.0, 41.0], [1e-5, 2e-4]):
        ticks = nice_ticks(values, ".2f")
        assert ticks[0] <= min(values) and max(values) <= ticks[-1] and 2 <= len(ticks) <= 8
    points = [(x, 9.0 if x == 5_001 else x % 7 / 7) for x in range(20_000)]
    few = thinned(points)
    assert len(few) <= 1000 and (5_001, 9.0) in few and few == sorted(few)


# ---- runs that are not whole ---------------------------------------------------------------


def test_a_line_that_is_not_whole_or_there_twice_is_left_out_and_said(run_folder):
    for name in LOGS:
        whole = (run_folder / name).read_text()
        again = whole.splitlines(keepends=True)[0]
        (run_folder / name).write_text(again + whole[: len(whole) - 40])
    (run_folder / "rollouts.jsonl").write_text(whole[: len(whole) - 40])
    text, data = report(run_folder)
    assert data["curves"]["steps"] == [1, 2] and len(data["runs"][0]["trees"]) == 2
    for name in LOGS:
        assert f"The last line of {name} is not complete" in text
        assert (f"Line 2 of {name} is there twice" in text) == (name != "rollouts.jsonl")


def test_a_run_that_goes_on_still(run_folder):
    rows = lines_of(run_folder, "evaluations.jsonl")
    partial = [row | {"step": 2, "questions": 2} for row in rows[:2]]
    for kept, words in ((rows[:2], "not evaluated since step 0"), ([], "not evaluated yet"),
                        (rows[:2] + partial, "at step 2, on 2 questions only")):  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in kept)
        (run_folder / "evaluations.jsonl").write_text(text)
        assert words in report(run_folder)[0]
    for name in LOGS:
        (run_folder / name).unlink()
    assert "no training step has been logged yet" in report(run_folder)[0]


def tree_with(place, field, value):
    """A good tree in the first line of a log, and one that holds this in the second line."""
    record = json.loads(json.dumps(TREES[0]))
    record[place][-1][field] = value
    return json.dumps(TREES[0]) + "\n" + json.dumps(record) + "\n"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("", "", "no such folder"),
        ("config.json", None, "holds no config.json"),
        ("config.json", '{"steps": ', "config.json: no JSON"),
        ("config.json", "[1]", "config.json: it must be an object"),
        ("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 3}\n', "metrics.jsonl, line 2"),
        ("metrics.jsonl", '{"reward": 1}\n', "metrics.jsonl, line 1: step is missing"),
        ("metrics.jsonl", '{"step": 1e999}\n', "metrics.jsonl, line 1: step inf"),
        ("evaluations.jsonl", '{"step": 0}\n', "line 1: decoding"),
        ("evaluations.jsonl", '{"step": 0, "decoding": "greedy", "questions": 1, '
         '"accuracy": 1, "domains": {"a": 3}}\n', "line 1: domains {'a': 3}"),
        ("rollouts.jsonl", '{"step": 1, "question": "", "nodes": 3, "leaves": 0}\n',
         "line 1: no rollout tree"),
        *(("rollouts.jsonl", tree_with(*wrong), words) for *wrong, words in [
            ("nodes", "parent", 99, "line 2: no rollout tree: node 8: its parent is 99"),
            ("nodes", "parent", 8, "node 8: its parent is 8"),
            ("nodes", "tokens", ["a", 3], "node 8: tokens must be a list of texts"),
            ("nodes", "token_entropy", [0.1], "1 entropies"),
            ("nodes", "author", "nobody", "author 'nobody'"),
            ("leaves", "node", 9, "a leaf stands at node 9 of 9"),
        ]),
    ],
)  # fmt: skip
def test_what_is_no_run_is_one_line_and_exit_code_2(name, text, words, run_folder, capsys):
    if not name:
        shutil.rmtree(run_folder)
    elif text is None:
        (run_folder / name).unlink()
    else:
        (run_folder / name).write_text(text)
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
    assert visible("a\n\t\x00\u202e\ud800é") == "a\n\t\\u{0}\\u{202e}\\u{d800}é"


@pytest.fixture
def known(tab, run_folder):
    """The page of the known run at its third step."""
    report(run_folder)
    tab.open(run_folder / "report.html", "#step=3")
    return tab


@pytest.fixture
def two(tab, run_folder, tmp_path):
    """A page of two runs; the first step of the second one asked two questions."""
    second = shutil.copytree(run_folder, tmp_path / "second")
    lines = (second / "rollouts.jsonl").read_text().replace('{"step": 1', '{"step": 2')
    (second / "rollouts.jsonl").write_text(lines)
    report(run_folder, second, html=tmp_path / "two.html")
    tab.open(tmp_path / "two.html")
    return tab


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


@pytest.mark.slow
def test_the_tree_of_a_known_run(known):
    record = TREES[2]
    counts = [known.count(x) for x in ("#tree .seg", "#tree .leaf", "#tree .decision.granted")]
    assert [*counts, known.count("#tree .forked")] == [23, 4, 2, 2]
    for i, node in enumerate(record["nodes"]):
        box = f"[data-node='{i}']"
        shown = "".join(known.texts(f"{box} > .text"))
        assert shown == ("".join(node["tokens"]) if i else record["question"])
        parent = known.js(f'document.querySelector("{box}").up?.dataset.node ?? null')
        assert parent == (None if node["parent"] is None else str(node["parent"]))
        if decision := node["decision"]:
            figures = [decision[name] for name in ("H", "H_initial", "gain", "probability")]
            shown = [text.removeprefix("+") for text in known.texts(f"{box} dd")]
            assert shown == [f"{figure:.4f}" for figure in figures]
            assert "P = 0.5 + 0.2 × gain > τ = 0.5" in known.texts(f"{box} .decision p")
    corners = known.js(
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
        (text,) = known.texts(f"[data-leaf='{i}']")
        sign = "+" if leaf["advantage"] > 0 else "−"
        assert f"trajectory {i + 1}" in text and f"reward {leaf['total']:g}" in text
        assert f"A {sign}{abs(leaf['advantage']):.2f}" in text
        assert ("right" if leaf["accuracy"] == 1 else "wrong") in text


@pytest.mark.slow
def test_the_switch_changes_the_shading(known):
    def shade(node, token):
        """Opacity of what lies behind a token, and its colour."""
        found = f"document.querySelectorAll('[data-node=\"{node}\"] .t')[{token}]"
        colour = known.js(f"getComputedStyle({found}).backgroundColor")
        *rgb, alpha = re.findall(r"[\d.]+", colour) + ["1"] * colour.startswith("rgb(")
        return float(alpha), [float(c) for c in rgb[:3]]

    H = TREES[2]["nodes"][20]["token_entropy"]
    order = sorted(range(len(H)), key=H.__getitem__)
    low, high = shade(20, order[0]), shade(20, order[-1])
    assert low[0] < 0.05 < 0.3 < high[0]
    assert shade(21, 3)[0] == 0  # a tool result has no entropy
    known.click("[value=advantage]")
    up, down = shade(15, 3), shade(22, 3)  # A +1.5 and -0.5
    assert up[0] > down[0] > 0.1 and shade(22, 0) == down
    assert up[1][2] > up[1][0] and down[1][0] > down[1][2]  # blue, orange
    assert shade(21, 3)[0] == 0


@pytest.mark.slow
def test_a_click_shows_a_trajectory_with_its_loss_mask_and_who_shares_a_segment(known):
    assert not known.seen("#panel")
    known.click("[data-leaf='2']")
    texts, authors = path_to(TREES[2], 2)
    assert known.seen("#panel") and known.texts("#chosen pre") == texts
    trained = [text for text, by in zip(texts, authors, strict=True) if by == "policy"]
    assert known.texts("#chosen .trained pre") == trained
    masks = [side.partition("mask ")[2][:1] for side in known.texts("#chosen .side")]
    assert masks == ["1" if by == "policy" else "0" for by in authors]
    style = "[...document.querySelectorAll('#chosen .t')].map((t) => getComputedStyle(t))"
    underlined = known.js(f"{style}.filter((t) => t.borderBottomStyle === 'solid').length")
    tokens = known.count("#chosen .t")
    assert underlined == known.count("#chosen .trained .t")
    (text,) = known.texts("#chosen")
    assert f"the {underlined} underlined tokens of {tokens}" in text and "advantage +1.50" in text
    assert known.count(".on-path") == len(texts) + 1
    known.click("[data-node='4']")
    rows = known.js(
        "[...document.querySelectorAll('.shares tr')]"
        ".map((row) => [...row.cells].map((c) => c.textContent))"
    )
    assert rows[1:] == [
        ["trajectory 2", "−0.50", "+0.50", "−0.50"],
        ["trajectory 3", "+1.50", "+0.50", "+1.50"],
        ["sum", "+1.00", "+1.00", "+1.00"],
    ]
    known.click("[data-node='2']")
    (text,) = known.texts("#chosen")
    assert "The first 10 tokens written after this result have entropy H = 0.0069" in text
    known.click("#close")
    assert not known.seen("#panel")


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(known):
    focus = "document.activeElement.dataset.node ?? 'leaf ' + document.activeElement.dataset.leaf"
    known.js("document.querySelector('#tree [tabindex=\"0\"]').focus()")
    seen = [known.js(focus)]
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowRight", "ArrowLeft", "ArrowDown"):
        known.press(key)
        seen.append(known.js(focus))
    assert seen == ["0", "1", "2", "3", "leaf 0", "3", "leaf 0"]
    assert known.js("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    known.press("Enter")
    assert known.texts("#chosen pre") == path_to(TREES[2], 0)[0]
    assert known.js("document.activeElement.ariaSelected") == "true"
    known.press("Escape")
    assert not known.seen("#panel")
    known.js("document.querySelector('#step').focus()")
    known.press("ArrowLeft")
    assert known.texts("#at") == ["2"] and known.count(".seg") == 9
    known.js("document.querySelector('.plot').focus()")
    known.press("Home")
    assert known.texts("#readout0") == ["step 1 0.75"]


@pytest.mark.slow
def test_values_and_trees_of_every_run_can_be_reached(two):
    two.mouse("mouseMoved", ".plot[data-chart='2']", across=0.95)
    last = lines_of(RUN, "metrics.jsonl")[2]
    assert two.texts("#readout2")[0].count(f"{last['entropy_after_tool']:.4f}") == 2
    (text,) = two.texts("#readout0")
    assert text.startswith("step 3") and "small" in text and f"{last['reward']:.2f}" in text
    pick = (
        "(() => {{ const s = document.querySelector('#{0}'); s.value = {1};"
        "s.dispatchEvent(new Event('{2}')); }})()"
    )
    two.js(pick.format("run", 1, "change"))
    assert two.count("#question option") == 2
    two.js(pick.format("question", 1, "change"))
    assert two.texts("[data-node='0'] .text") == [TREES[1]["question"]]
    two.js(pick.format("step", 1, "input"))
    assert two.texts("[data-node='0'] .text") == [TREES[2]["question"]]


@pytest.mark.slow
def test_a_hostile_rollout_runs_nothing(tab, tmp_path):
    run = hostile_run()
    path = tmp_path / "page.html"
    path.write_text(page(run.name, [run, run]), encoding="utf-8", errors="replace")
    tab.open(path)
    for name, number in (("leaf", 4), ("node", 23)):
        for i in range(number):
            tab.click(f"[data-{name}='{i}']")
    tab.mouse("mouseMoved", ".plot", across=0.5)
    tab.js("new Promise((done) => setTimeout(done, 200))")
    assert tab.js("window.pwned") is None and tab.count("script") == 2 and tab.count("img") == 0
    assert HOSTILE in tab.texts("h1")[0]
    text = tab.texts("[data-node='1'] .text")[0]
    assert HOSTILE in text and "\\u{202e}\\u{0}\\u{d800}" in text


def lowest_contrast(tab, selector):
    """The smallest contrast ratio of a text to what lies behind it (WCAG 2.1, 1.4.3)."""
    return tab.js(f"""(() => {{
        const paper = document.createElement("canvas").getContext("2d");
        const paint = (colour) => {{ paper.fillStyle = colour; paper.fillRect(0, 0, 1, 1); }};
        const luminance = () => {{
            const linear = [...paper.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
                .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
            return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
        }};
        const ratios = [...document.querySelectorAll({json.dumps(selector)})]
            .filter((e) => !e.closest(".following :is(.seg, .leaf):not(.on-path)"))
            .filter((e) => e.checkVisibility())
            .map((e) => {{
                const behind = ["#fff"];
                for (let at = e; at; at = at.parentElement)
                    behind.splice(1, 0, getComputedStyle(at).backgroundColor);
                behind.forEach(paint);
                const under = luminance();
                paint(getComputedStyle(e).color);
                const text = luminance();
                return (Math.max(text, under) + 0.05) / (Math.min(text, under) + 0.05);
            }});
        return Math.min(...ratios);
    }})()""")


@pytest.mark.slow
def test_it_fits_a_narrow_window_and_prints_without_controls(known):
    known.click("[data-leaf='2']")
    for scheme in ("light", "dark"):
        known.look(390, 720, scheme)
        assert known.js("document.documentElement.scrollWidth") <= 390
        for by in ("advantage", "entropy"):
            known.js(f"document.querySelector('[value={by}]').click()")
            for selector in "p,.note,th,td,td *,.leaf p,.seg .t,.head,.decision p".split(","):
                assert lowest_contrast(known, selector) >= 4.5, (by, selector)
    known.look(1100, 800, media="print")
    known.js("dispatchEvent(new Event('beforeprint'))")
    assert known.js("document.querySelector('#settings details').open")
    assert not known.seen("#controls") and known.count(".settings tr") == len(CONFIG) + 1
