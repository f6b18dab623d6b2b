"""The released code (RUC-NLPIR/ARPO, a95cd08), as far as it differs: quirks included.

Its measurement of entropy for the branch rule `official`, and its reward and evaluation behind
--official_rewards. The rule itself is in entropy.py. Nothing here is needed to understand ARPO.
Tested against numbers made by running that code (tests/parity).
"""

from __future__ import annotations

import re
import string

from torch import Tensor

from advantage import Reward, Segment, total_reward
from engine.judge import overlap
from entropy import official_entropy

# ---- entropy (vllm_rollout_with_tools.py) -------------------------------------------------

TOKENS, TOP = 20, 10  # measured of a segment; log-probs that its engine reports of each


def add_entropy(drafts: list[Segment], added: list[int], scores: tuple[Tensor, ...]) -> None:
    """Sums up `Segment.entropy` while scores pass by: first 20 tokens, top 10 of each, no mean.

    `added` tokens were just written to each of R drafts, from S steps of (R, V) scores.
    """
    for row, (draft, n) in enumerate(zip(drafts, added, strict=True)):
        before = len(draft.token_ids) - n
        steps = scores[: max(0, min(n, TOKENS - before))]
        V = scores[0].shape[-1]
        top = [s[row].log_softmax(-1).topk(min(TOP, V)).values.tolist() for s in steps]
        draft.entropy = (draft.entropy or 0.0) + official_entropy(top, V)


# ---- reward (deep_research.py) ------------------------------------------------------------


def transcript(turns: list[tuple[str, str]]) -> str:
    """One text without authors; the official tool is called python where ours is a calculator."""
    return "".join(text for _, text in turns).replace("calculator>", "python>")


def official_reward(transcript: str, answers: str | list[str]) -> Reward:
    """The released `compute_score`: one text without authors, the tools <search> and <python>."""
    answer = official_answer(transcript)
    prediction = official_boxed(answer) if answer else None
    well_formed = prediction is not None
    accuracy = f1_score(prediction, answers) if well_formed else 0.0
    # quirk: a closing tag anywhere, even in a thought, is a tool used
    used = ("</search>" in transcript) + ("</python>" in transcript)
    return Reward(total_reward(well_formed, accuracy, used), accuracy, well_formed, used)


def official_answer(text: str) -> str | None:
    """What stands in the answer tags; None where the format is broken."""
    # quirk: tags are counted, not paired: </think> may come first, any text follow the answer
    opened, closed, *answers = map(text.count, "<think> </think> <answer> </answer>".split())
    if opened == 0 or opened != closed or answers != [1, 1]:
        return None
    for tool in ("search", "python"):
        call = text.find(f"<{tool}>")
        while call >= 0:  # quirk: further calls before the same </result> are not looked at
            call_end, result = text.find(f"</{tool}>", call), text.find("<result>", call)
            result_end = text.find("</result>", result)
            if not call < call_end < result < result_end:
                return None
            call = text.find(f"<{tool}>", result_end)
    answer = text[text.find("<answer>") + len("<answer>") : text.find("</answer>")]
    return answer if "\\boxed{" in answer and "}" in answer else None


def official_boxed(text: str) -> str | None:
    if "\\boxed " in text:  # quirk: it runs to the next $, and beats every \boxed{..}
        return text.rpartition("\\boxed ")[2].partition("$")[0]
    box = last_boxed(text)  # quirk: a last \boxed without { hides them, and \{ is a brace
    return box[7:-1] if box[:7] == "\\boxed{" and box.count("{") == box.count("}") else None


def normalize_answer(text: str) -> str:
    """As below, without ASCII punctuation (SQuAD, deep_research.py)."""
    return normalised(text.translate(str.maketrans("", "", string.punctuation)))


def normalised(text: str, articles: bool = False) -> str:
    """Lower case, single spaces, no articles unless they are wanted."""
    text = text.lower() if articles else re.sub(r"\b(a|an|the)\b", " ", text.lower())
    return " ".join(text.split())


def f1_score(prediction: str, answers: str | list[str]) -> float:
    """2 |shared words| / (|prediction| + |answer|), the best over the answers; yes/no exactly."""
    best = 0.0
    for answer in [answers] if isinstance(answers, str) else answers:
        p, a = normalize_answer(prediction), normalize_answer(answer)
        if p == a or not {p, a} & {"yes", "no", "noanswer"}:
            best = max(best, overlap(p.split(), a.split()))
    return best


# ---- evaluation (evaluation/src) ----------------------------------------------------------


def official_judge(text: str, answers: list[str], is_math: bool) -> dict:
    """`judge` by the released code: `text` is the whole transcript, results included."""
    prediction = official_prediction(text) or last_lines(text)
    given = answers if prediction else []
    return {"prediction": prediction, **compare(prediction, given, is_math)}


def last_lines(text: str) -> str:
    """Quirk: where nothing was answered, whatever was said last is the answer."""
    return "\n".join(text.replace("\n\n", "\n").strip().split("\n")[-5:])


def official_prediction(text: str) -> str:
    r"""The last \boxed in the last <answer>..</answer>, or what stands there; without tags, any."""
    tagged = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    box = last_boxed(tagged[-1] if tagged else text)
    for opening in ("\\boxed{", "\\text{"):
        if box.startswith(opening) and box.endswith("}"):
            box = box[len(opening) : -1]
    return box or (tagged[-1] if tagged else "")


def last_boxed(text: str) -> str:
    r"""The last \boxed with its braces; quirk: everything to the end where they do not close."""
    _, found, rest = text.rpartition("\\boxed")
    depth = 0
    for i, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if character == "}" and depth == 0:
            return found + rest[: i + 1]
    return found + rest if found else ""


def compare(prediction: str, answers: list[str], is_math: bool) -> dict:
    """em, acc (an answer stands in the prediction), f1, math_equal: the best over the answers."""
    if not is_math and len(answers) == 1 and answers[0].startswith("["):
        answers = re.split(r",\s*", answers[0].strip("[]"))  # quirk: it is taken for a list
    p, *answers = (normalised(text, articles=is_math) for text in (prediction, *answers))
    return {
        "em": int(p in answers),
        "acc": int(any(a in p for a in answers)),  # quirk: any text holds an answer "the"
        "f1": max((overlap(p.split(), a.split()) for a in answers), default=0.0),
        "math_equal": int(any(official_math_equal(p, a) for a in answers)),
    }


def official_math_equal(a: str | None, b: str | None) -> bool:
    try:
        return simplify_math(a) == simplify_math(b)
    except (ValueError, AttributeError):
        return a == b


def simplify_math(text: str) -> str:
    r"""One spelling for the common ones of LaTeX, as in the released math_equivalence.py:

        \tfrac12, \dfrac{1}{2}, 1/2, .5   \frac{1}{2}        \sqrt3               \sqrt{3}
        \left( \right)                    ( )                 x = 3                3
        90^\circ, \$5, 50\%, 12\text{ cm} 90, 5, 50, 12       spaces               none

    ValueError where it gives up: a \frac or \sqrt with nothing after it, two units.
    """
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = re.sub("[td]frac", "frac", text)
    text = re.sub(r"\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$", "", text)
    if text.count("\\text{ ") > 1:
        raise ValueError("two units")
    text = text.partition("\\text{ ")[0].replace("\\%", "")
    text = re.sub(r"^\.", "0.", re.sub(r"([ {])\.", r"\g<1>0.", text))
    left, equals, right = text.partition("=")
    if equals and "=" not in right and len(left) <= 2:
        text = right
    text = braces(text, "sqrt", r"\\sqrt([^{])", r"\\sqrt{\1}").replace(" ", "")
    if not re.search(r"\\frac[^{](?:$|(?=\\frac))", text):  # quirk: then all of it stays
        text = braces(text, "frac", r"\\frac([^{])([^{])", r"\\frac{\1}{\2}")
        text = re.sub(r"\\frac([^{])\{", r"\\frac{\1}{", text)
    text = "\\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"\A(0|-?[1-9]\d*)/(0|-?[1-9]\d*)\Z", r"\\frac{\1}{\2}", text)


def braces(text: str, command: str, pattern: str, replacement: str) -> str:
    if re.search(rf"\\{command}(?:$|(?=\\{command}))", text):
        raise ValueError(f"\\{command} of nothing")
    return re.sub(pattern, replacement, text)
