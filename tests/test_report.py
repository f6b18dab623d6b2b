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
from common import change_json, lines_of, write_lines
from scripted import main

from app.page.curves import curve_data, nice_ticks, thinned
from app.page.page import Run, page
from app.page.read import LOGS
from app.page.trees import action_start, answer, fork_data, tree, visible

RUN = Path(__file__).parent / "run"
HOSTILE = '<script>window.pwned = 1</script><!-- "><img src=x onerror="window.pwned = 1"> </script>'
CONFIG = json.loads((RUN / "config.json").read_text())
TREES = lines_of(RUN, "rollouts.jsonl")


@pytest.fixture
def run_folder(tmp_path):
    return Path(shutil.copytree(RUN, tmp_path / "small"))


def report(*folders, html=None):
    """The page of some runs, and the data in it."""
    assert main("report", *folders, *(["--html", html] if html else [])) == 0
    text = (html or folders[0] / "report.html").read_text(encoding="utf-8")
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
        assert [n["tokens"] for n in drawn["nodes"]] == [n["tokens"] for n in record["nodes"]]
        assert [x["reward"] for x in drawn["leaves"]] == [x["total"] for x in record["leaves"]]


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
    change_json(other / "config.json", branch_rule="random")
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
    few = thinned([(x, 9.0 if x == 5_001 else x % 7 / 7) for x in range(20_000)])
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
        write_lines(run_folder / "evaluations.jsonl", kept)
        assert words in report(run_folder)[0]
    for name in LOGS:
        (run_folder / name).unlink()
    assert "no training step has been logged yet" in report(run_folder)[0]


def test_a_folder_without_a_run_is_one_line(refused, tmp_path):
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    refused(main("report", circle), f"{circle}: ")
    refused(main("report", tmp_path / ("x" * 5000)), "name too long")
    refused(main("report", tmp_path / "none"), f"{tmp_path / 'none'}: there is no such folder")
    refused(main("report", tmp_path), f"{tmp_path} holds no config.json")


def tree_with(place, field, value):
    """A good tree in the first line of a log, and one that holds this in the second line."""
    record = json.loads(json.dumps(TREES[0]))
    record[place][-1][field] = value
    return json.dumps(TREES[0]) + "\n" + json.dumps(record) + "\n"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.json", '{"steps": ', "config.json: no JSON"),
        ("config.json", "[1]", "config.json: it must be an object"),
        ("metrics.jsonl", '{"step": 1}\nnonsense\n{"step": 3}\n', "metrics.jsonl, line 2"),
        ("metrics.jsonl", '{"reward": 1}\n', "metrics.jsonl, line 1: step is missing"),
        ("evaluations.jsonl", '{"step": 0}\n', "line 1: decoding"),
        ("evaluations.jsonl", '{"step": 0, "decoding": "greedy", "questions": 1, '
         '"accuracy": 1, "domains": {"a": 3}}\n', "line 1: domains {'a': 3}"),
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
def test_what_is_no_run_is_one_line_and_exit_code_2(name, text, words, run_folder, refused):
    (run_folder / name).write_text(text)
    assert refused(main("report", run_folder), words, str(run_folder)) == ""
    assert not (run_folder / "report.html").exists()


@pytest.mark.slow
def test_any_value_may_be_of_any_kind(run_folder, capsys):
    """A page, or one line and exit code 2; never an exception."""
    rng = random.Random(0)
    odd = [None, -1, 0, 1e999, float("nan"), 10**400, "x", "", [], [1], {}, {"a": 1}, True]
    ends = set()
    for _ in range(300):
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
        write_lines(run_folder / name, rows)
        code = main("report", run_folder)
        assert code in (0, 2) and len(capsys.readouterr().err.splitlines()) == code // 2
        ends.add(code)
        shutil.copy(RUN / name, run_folder / name)
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
def known(tab, run_folder):
    """The page of the known run at its third step; what else the link says means nothing."""
    report(run_folder)
    tab.open(run_folder / "report.html", "#step=3&shade=&run=length&question=length")
    return tab


BOX = """({
    node: Number(e.dataset.node),
    parent: e.up ? Number(e.up.dataset.node) : null,
    text: [...e.querySelectorAll(":scope > .text")].map((text) => text.textContent).join(""),
    figures: [...e.querySelectorAll("dd")].map((figure) => Number(figure.textContent)),
    ...e.getBoundingClientRect().toJSON(),
})"""


@pytest.mark.slow
def test_the_tree_of_a_known_run(known):
    kinds = ("#tree .seg", "#tree .leaf", "#tree .decision.granted", "#tree .forked")
    assert [len(known.all(kind)) for kind in kinds] == [23, 4, 2, 2]
    record, boxes = TREES[2], sorted(known.all("#tree .seg", BOX), key=lambda box: box["node"])
    for box, node in zip(boxes, record["nodes"], strict=True):
        decision, question = node["decision"] or {}, node["author"] == "prompt"
        assert box["text"] == (record["question"] if question else "".join(node["tokens"]))
        names = [name for name in ("H", "H_initial", "gain", "probability") if name in decision]
        assert box["figures"] == [round(decision[name], 4) for name in names]
        assert box["parent"] == node["parent"]
        above = {"right": box["left"] - 1} if question else boxes[node["parent"]]
        if node["author"] == "tool":  # a result stands under its call,
            assert box["left"] == above["left"] and abs(box["top"] - above["bottom"]) < 1
        else:  # and what follows it to the right, its forks below
            assert above["right"] < box["left"] < above["right"] + 40
    assert boxes[3]["top"] < boxes[16]["top"] and boxes[6]["top"] < boxes[11]["top"]
    assert "P = 0.5 + 0.2 × gain > τ = 0.5" in known.all("#tree .decision p")
    for i, leaf in enumerate(record["leaves"]):
        (text,) = known.all(f"[data-leaf='{i}']")
        verdict = "right" if leaf["accuracy"] == 1 else "wrong"
        A = f"{leaf['advantage']:+.2f}".replace("-", "−")
        for words in (f"trajectory {i + 1}", f"reward {leaf['total']:g}", f"A {A}", verdict):
            assert words in text


@pytest.mark.slow
def test_the_switch_changes_the_shading(known):
    def shade(node, token):
        """Opacity of what lies behind a token, and its colour."""
        colours = known.all(f"[data-node='{node}'] .t", "getComputedStyle(e).backgroundColor")
        *rgb, alpha = [*re.findall(r"[\d.]+", colours[token]), "1"][:4]
        return float(alpha), [float(c) for c in rgb]

    H = TREES[2]["nodes"][20]["token_entropy"]
    low, high = shade(20, H.index(min(H))), shade(20, H.index(max(H)))
    assert low[0] < 0.05 < 0.3 < high[0]
    assert shade(21, 3)[0] == 0  # a tool result has no entropy
    known.click("[value=advantage]")
    up, down = shade(15, 3), shade(22, 3)  # A +1.5 and -0.5
    assert up[0] > down[0] > 0.1 and shade(22, 0) == down
    assert up[1][2] > up[1][0] and down[1][0] > down[1][2]  # blue, orange
    assert shade(21, 3)[0] == 0


ROW = """[
    e.querySelector("pre").textContent,
    e.querySelector(".side").textContent.match(/mask (.)/)[1],
    ...new Set([...e.querySelectorAll(".t")].map((t) => getComputedStyle(t).borderBottomStyle)),
]"""


@pytest.mark.slow
def test_a_click_shows_a_trajectory_with_its_loss_mask_and_who_shares_a_segment(known):
    nodes, at = TREES[2]["nodes"], TREES[2]["leaves"][2]["node"]
    path = []
    while at is not None:
        path.insert(0, nodes[at])
        at = nodes[at]["parent"]
    assert not known.seen("#panel")
    known.click("[data-leaf='2']")
    masks = {"policy": ["1", "solid"], "prompt": ["0", "none"], "tool": ["0", "none"]}
    expected = [["".join(node["tokens"]), *masks[node["author"]]] for node in path]
    assert known.seen("#panel") and known.all("#chosen .row", ROW) == expected
    (text,) = known.all("#chosen")
    trained = sum(len(node["tokens"]) for node in path if node["author"] == "policy")
    tokens = sum(len(node["tokens"]) for node in path)
    assert f"the {trained} underlined tokens of {tokens}" in text and "advantage +1.50" in text
    assert len(known.all(".on-path")) == len(path) + 1
    known.click("[data-node='4']")
    assert known.all(".shares tr", "[...e.cells].map((c) => c.textContent)")[1:] == [
        ["trajectory 2", "−0.50", "+0.50", "−0.50"],
        ["trajectory 3", "+1.50", "+0.50", "+1.50"],
        ["sum", "+1.00", "+1.00", "+1.00"],
    ]
    known.click("[data-node='2']")
    (text,) = known.all("#chosen")
    assert "The first 10 tokens written after this result have entropy H = 0.0069" in text
    known.click("#close")
    assert not known.seen("#panel")


@pytest.mark.slow
def test_the_keyboard_alone_is_enough(known):
    seen = []
    known.js("document.querySelector('#tree [tabindex=\"0\"]').focus()")
    for key in ("", *["ArrowRight"] * 4, "ArrowLeft", "ArrowDown"):
        known.press(key) if key else None
        seen += known.all("#tree :focus", "e.dataset.node ?? `leaf ${e.dataset.leaf}`")
    assert seen == ["0", "1", "2", "3", "leaf 0", "3", "leaf 0"]
    known.press("Enter")
    assert known.all(":focus", "getComputedStyle(e).outlineStyle + e.ariaSelected") == ["solidtrue"]
    assert known.all("#chosen h3")[0].startswith("Trajectory 1:")
    known.press("Escape")
    assert not known.seen("#panel")
    known.js("document.querySelector('#step').focus()")
    known.press("ArrowLeft")
    assert known.all("#at") == ["2"] and len(known.all(".seg")) == 9
    known.js("document.querySelector('.plot').focus()")
    known.press("Home")
    assert known.all("#readout0") == ["step 1 0.75"]


@pytest.mark.slow
def test_values_and_trees_of_every_run_can_be_reached(tab, run_folder, tmp_path):
    """Of two runs; the first step of the second one asked two questions."""
    second = shutil.copytree(run_folder, tmp_path / "second")
    lines = (second / "rollouts.jsonl").read_text().replace('{"step": 1', '{"step": 2')
    (second / "rollouts.jsonl").write_text(lines)
    report(run_folder, second, html=tmp_path / "two.html")
    tab.open(tmp_path / "two.html")

    def pick(name, value, event):
        tab.all(f"#{name}", f"(e.value = {value}, e.dispatchEvent(new Event('{event}')))")
        return tab.all("[data-node='0'] .text")

    tab.mouse("mouseMoved", ".plot[data-chart='2']", across=0.95)
    last = lines_of(RUN, "metrics.jsonl")[2]
    assert tab.all("#readout2")[0].count(f"{last['entropy_after_tool']:.4f}") == 2
    (text,) = tab.all("#readout0")
    assert text.startswith("step 3") and "small" in text and f"{last['reward']:.2f}" in text
    pick("run", 1, "change")
    assert len(tab.all("#question option")) == 2
    assert pick("question", 1, "change") == [TREES[1]["question"]]
    assert pick("step", 1, "input") == [TREES[2]["question"]]


@pytest.mark.slow
def test_a_hostile_rollout_runs_nothing(tab, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(page(HOSTILE, [hostile_run()] * 2), encoding="utf-8", errors="replace")
    tab.open(path)
    for box in [*(f"leaf='{i}'" for i in range(4)), *(f"node='{i}'" for i in range(23))]:
        tab.click(f"[data-{box}]")
    tab.mouse("mouseMoved", ".plot", across=0.5)
    tab.js("new Promise((done) => setTimeout(done, 200))")
    assert tab.js("window.pwned") is None
    assert len(tab.all("script")) == 2 and tab.all("img") == []
    assert HOSTILE in tab.all("h1")[0]
    text = tab.all("[data-node='1'] .text")[0]
    assert HOSTILE in text and "\\u{202e}\\u{0}\\u{d800}" in text


# The contrast ratio of a text to what lies behind it (WCAG 2.1, 1.4.3).
CONTRAST = """canvas = document.createElement("canvas");
paper = canvas.getContext("2d", { willReadFrequently: true });
contrast = (e) => {
    if (!e.checkVisibility() || e.closest(".following :is(.seg, .leaf):not(.on-path)")) return 21;
    const paint = (colour) => { paper.fillStyle = colour; paper.fillRect(0, 0, 1, 1); };
    const luminance = () => {
        const linear = [...paper.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
            .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
        return 0.05 + 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
    };
    const behind = [];
    for (let at = e; at; at = at.parentElement)
        behind.unshift(getComputedStyle(at).backgroundColor);
    ["#fff", ...behind].forEach(paint);
    const under = luminance();
    paint(getComputedStyle(e).color);
    return Math.max(luminance() / under, under / luminance());
}"""


@pytest.mark.slow
def test_it_fits_a_narrow_window_and_prints_without_controls(known):
    known.click("[data-leaf='2']")
    known.js(CONTRAST)
    for scheme in ("light", "dark"):
        known.look(390, 720, scheme)
        assert known.js("document.documentElement.scrollWidth") <= 390
        for by in ("advantage", "entropy"):
            known.js(f"document.querySelector('[value={by}]').click()")
            texts = "p,.note,th,td,td *,.leaf p,.seg .t,.head,.decision p"
            lowest = min(known.all(texts, "[contrast(e), e.outerHTML]"))
            assert lowest[0] >= 4.5, (scheme, by, lowest)
    known.look(1100, 800, media="print")
    known.js("dispatchEvent(new Event('beforeprint'))")
    assert known.js("document.querySelector('#settings details').open")
    assert not known.seen("#controls") and len(known.all(".settings tr")) == len(CONFIG) + 1
