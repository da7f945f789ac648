"""How answers are scored, by the rules of the public benchmarks' own scripts.

A score is of one answer, in [0, 1], and takes the answer and what is accepted for it. Measures are of all answers
together, where the number that papers print is no mean over samples (F1, MME's pairs, MMBench's circles); they come in
the units that papers print: per cent, and points for MME.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenreduce.benchmarks.benchmark import Sample, normalised
from tokenreduce.knobs import nearest

LETTERS = "ABCDEFGH"
"""Names of the choices of a multiple-choice question."""
MME_TASKS = {
    "perception": (
        *("existence", "count", "position", "color", "posters"),
        *("celebrity", "scene", "landmark", "artwork", "OCR"),
    ),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}
"""MME's categories, and which of its two scores each one belongs to."""

Score = Callable[[str, Sequence[str]], float]
Measures = Callable[[Sequence[str], Sequence[Sample]], dict[str, float]]


def exact_match(answer: str, accepted: Sequence[str]) -> float:
    """1 for an accepted answer, whatever its case, spaces and final full stop: how GQA is scored (arXiv 1902.09506,
    ``eval.py``; LLaVA's conversion takes off case and full stop).

    >>> exact_match("Top-left.", ["top-left", "upper left"])
    1.0
    """
    return float(normalised(answer) in {normalised(each) for each in accepted})


def vqa_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """Soft accuracy against the answers of (officially ten) people: VQAv2's and TextVQA's metric.

    ``min(1, agreeing / 3)``, averaged over leaving each person out, after :func:`vqa_normalised` (arXiv 1505.00468;
    https://visualqa.org/evaluation.html; facebookresearch/mmf, ``TextVQAAccuracyEvaluator``).

    >>> vqa_accuracy("nokia", ["nokia"] * 3 + ["toshiba"] * 7)
    0.9
    """
    given = vqa_normalised(answer)
    agrees = [vqa_normalised(each) == given for each in accepted]
    return sum(min(1.0, (sum(agrees) - agree) / 3) for agree in agrees) / len(agrees)


_NUMBERS = {
    "none": "0",
    "zero": "0",
    "one": "1",
    "two": "2",
    "three": "3",
    "four": "4",
    "five": "5",
    "six": "6",
    "seven": "7",
    "eight": "8",
    "nine": "9",
    "ten": "10",
}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`!'
# Not what its authors meant ("not after a digit"), but what it does: every full stop goes that no digit follows.
_FULL_STOP = re.compile(r"(?!<=\d)\.(?!\d)")
_WRITTEN_IN_FULL = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're
there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've
when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't
wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _WRITTEN_IN_FULL.split()
    for place, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}
"""Contractions that lack an apostrophe, with what they stand for; the last is the official table's own mistake."""


def vqa_normalised(answer: str) -> str:
    """An answer as VQA's servers compare it: no case, articles or punctuation, numbers as figures, contractions whole.

    Equal to ``EvalAIAnswerProcessor`` of facebookresearch/mmf, which follows GT-Vision-Lab/VQA, ``vqaEval.py``.

    >>> vqa_normalised("The two dogs, dont bark!")
    "2 dogs don't bark"
    """
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        spaced = spaced.replace(mark, "" if beside_space else " ")
    words = [_NUMBERS.get(word, word) for word in _FULL_STOP.sub("", spaced).split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def anls(answer: str, accepted: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity to the nearest accepted answer, 0 below one half: DocVQA's metric
    (arXiv 1907.00490, section 4; the evaluation script of https://rrc.cvc.uab.es/?ch=17).

    >>> anls("Univercity", ["University", "the university"])
    0.9
    """
    similarity = 1 - min(_distance(answer, each) for each in accepted)
    return similarity if similarity >= 0.5 else 0.0


def _distance(answer: str, accepted: str) -> float:
    """Edits between two texts, less case and space, by the length of the longer one."""
    longest = max(len(answer), len(accepted))
    one, other = (" ".join(text.strip().lower().split()) for text in (answer, accepted))
    row = list(range(len(other) + 1))
    for i, left in enumerate(one, 1):
        above, row = row, [i]
        for j, right in enumerate(other, 1):
            row.append(min(above[j] + 1, row[-1] + 1, above[j - 1] + (left != right)))
    return row[-1] / longest if longest else 0.0


def relaxed_accuracy(answer: str, accepted: Sequence[str]) -> float:
    """1 for a number within 5 % of an accepted one, or the same text: ChartQA's metric (arXiv 2203.10244, section 5.1;
    ``relaxed_correctness`` of google-research/pix2struct). ``7%`` is the number 0.07.

    >>> relaxed_accuracy("2.6", ["2.5"]), relaxed_accuracy("2.7", ["2.5"]), relaxed_accuracy("yes", ["Yes"])
    (1.0, 0.0, 1.0)
    """
    return max(_relaxed(answer.strip(), each.strip()) for each in accepted)


def _relaxed(answer: str, accepted: str) -> float:
    given, wanted = _number(answer), _number(accepted)
    if given is not None and wanted:
        return float(abs(given - wanted) / abs(wanted) <= 0.05)
    return float(answer.lower() == accepted.lower())


def is_number(text: str) -> bool:
    """True for what :func:`relaxed_accuracy` compares as a number."""
    return _number(text.strip()) is not None


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def yes_no(answer: str, accepted: Sequence[str]) -> float:
    """1 where the answer means the same as the accepted one by POPE's reading (see :func:`means_yes`)."""
    return float(means_yes(answer) == (normalised(accepted[0]) == "yes"))


def means_yes(answer: str) -> bool:
    """POPE's reading of an answer: no where "no" or "not" is a word of its first sentence, yes everywhere else.

    arXiv 2305.10355; RUCAIBox/POPE, ``evaluate.py``. What is neither counts as yes, the empty answer included.

    >>> means_yes("No, there is not."), means_yes("There is one. No doubt"), means_yes("")
    (False, True, True)
    """
    words = answer.split(".")[0].replace(",", "").split()
    return not {"No", "no", "not"} & set(words)


def yes_no_measures(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """POPE's figures in per cent, with yes as the positive class; a ratio of no cases is 0."""
    said = [means_yes(answer) for answer in answers]
    true = [normalised(sample.answers[0]) == "yes" for sample in samples]
    hits = sum(yes and right for yes, right in zip(said, true, strict=True))
    return {
        "F1": _percent(2 * hits, sum(said) + sum(true)),
        "precision": _percent(hits, sum(said)),
        "recall": _percent(hits, sum(true)),
        "yes": _percent(sum(said), len(said)),
    }


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def mme_match(answer: str, accepted: Sequence[str]) -> float:
    """1 where "yes" or "no", whichever is right, stands in the first four letters of the answer: MME's reading (arXiv
    2306.13394; ``calculation.py`` of its evaluation tool). What is neither is wrong.

    >>> mme_match("Yes, it is.", ["Yes"]), mme_match("It is not.", ["No"])
    (1.0, 0.0)
    """
    start = answer.lower().strip().replace(".", "")[:4]
    meant = "yes" if "yes" in start else "no" if "no" in start or start == "n" else "yes" if start == "y" else "other"
    return float(meant == accepted[0].lower().strip().rstrip("."))


def mme_measures(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """MME's scores in points: for every category accuracy plus accuracy+, summed over the categories.

    Accuracy+ is the share of images whose two questions are both answered right. Perception has at most 2000 points,
    cognition 800; categories that are not MME's are summed as "other". An image with a single answered question is
    left out.
    """
    images: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for answer, sample in zip(answers, samples, strict=True):
        images[sample.category][sample.image_id].append(mme_match(answer, sample.answers))
    parts: dict[str, float] = {}
    for category, pairs in images.items():
        part = next((part for part, tasks in MME_TASKS.items() if category in tasks), "other")
        points = [100 * sum(scores) / len(scores) + 100 * all(scores) for scores in pairs.values() if len(scores) > 1]
        if points:
            parts[part] = parts.get(part, 0.0) + sum(points) / len(points)
    return {part: parts[part] for part in ("perception", "cognition", "other") if part in parts}


def multiple_choice(answer: str, accepted: Sequence[str]) -> float:
    """1 where the answer names the right letter, by MMBench's reading, or is the right choice's own words.

    ``accepted`` is the letter, and the words where they are known. ScienceQA's reading (LLaVA, ``eval_science_qa.py``)
    is a part of MMBench's (``can_infer_option`` of its evaluator); the latter asks GPT about an answer that names no
    letter, which is wrong here.
    """
    letter = chosen_letter(answer)
    if letter is not None:
        return float(letter == accepted[0].strip().upper())
    return exact_match(answer, accepted)


_AROUND_LETTER = (
    *(("", end) for end in ("", ".", ",", ":", ")", ").")),
    *(("(", end) for end in (")", ").")),
    *((":", end) for end in ("", ",", ".", ")", ").")),
)


def chosen_letter(answer: str) -> str | None:
    """The one letter that an answer names as a word of its own: ``B``, ``B.``, ``(B)``, ``The answer is B.``

    >>> chosen_letter("The answer is (B)."), chosen_letter("A or B"), chosen_letter("A cat on a mat")
    ('B', None, None)
    """
    words = answer.split()
    for before, after in _AROUND_LETTER:
        found = [letter for letter in LETTERS if f"{before}{letter}{after}" in words]
        article = not before + after and "A" in words and len(words) > 3
        if len(found) == 1 and not article:
            return found[0]
    return None


def circular_measures(answers: Sequence[str], samples: Sequence[Sample]) -> dict[str, float]:
    """MMBench's accuracy in per cent: a question is right if it is in every order of its choices (arXiv 2307.06281).

    Rows of one question have ids that differ by a multiple of a million. In a shorter run, the rows that are there
    count.
    """
    rounds: dict[int, list[float]] = defaultdict(list)
    for answer, sample in zip(answers, samples, strict=True):
        if reason := _no_number_for_an_id(sample):
            raise ValueError(reason)
        rounds[int(sample.id) % 1_000_000].append(multiple_choice(answer, sample.answers))
    return {"circular": 100 * sum(all(scores) for scores in rounds.values()) / len(rounds)}


def _met_by_silence(sample: Sample) -> str:
    blank = [answer for answer in sample.answers if not normalised(answer)]
    return f"the answer {blank[0]!r} is met by saying nothing" if blank else ""


def _no_number(sample: Sample) -> str:
    endless = [answer for answer in sample.answers if not math.isfinite(_number(answer.strip()) or 0)]
    return f"the answer {endless[0]!r} is no number that anything is near to" if endless else _met_by_silence(sample)


def _neither_yes_nor_no(sample: Sample) -> str:
    others = [answer for answer in sample.answers if normalised(answer) not in ("yes", "no")]
    if others:
        return f"the answer {others[0]!r} is neither yes nor no"
    both = len({normalised(answer) for answer in sample.answers}) > 1
    return "the answer is both yes and no" if both else ""


def _no_number_for_an_id(sample: Sample) -> str:
    if sample.id.isdecimal():
        return ""
    return (
        f"sample id {sample.id!r} is no number, and MMBench's circles are told by their numbers: give the column of "
        "MMBench's index as benchmark.id_column, or take metric=choice"
    )


def _nothing(sample: Sample) -> str:
    return ""


@dataclass(frozen=True)
class Metric:
    """One way to score: each answer, and all together.

    fewest:  how many accepted answers a sample must have.
    refusal: why a sample cannot be scored; empty if it can.
    choices: True if questions must have choices.
    numbers: True if some answer of a benchmark must be a number.
    """

    score: Score
    measures: Measures | None = None
    fewest: int = 1
    refusal: Callable[[Sample], str] = _nothing
    choices: bool = False
    numbers: bool = False


METRICS: Mapping[str, Metric] = {
    "exact": Metric(exact_match, refusal=_met_by_silence),
    "vqa": Metric(vqa_accuracy, fewest=4),
    "anls": Metric(anls, refusal=_met_by_silence),
    "relaxed": Metric(relaxed_accuracy, refusal=_no_number, numbers=True),
    "yes_no": Metric(yes_no, yes_no_measures, refusal=_neither_yes_nor_no),
    "mme": Metric(mme_match, mme_measures, refusal=_neither_yes_nor_no),
    "choice": Metric(multiple_choice, choices=True),
    "mmbench": Metric(multiple_choice, circular_measures, refusal=_no_number_for_an_id, choices=True),
}
"""The metrics by name."""


def metric_named(name: Any) -> Metric:
    """The metric of this name. Raises ``ValueError`` with the near one."""
    if name not in METRICS:
        raise ValueError(f"unknown metric {name!r}: {nearest(str(name), list(METRICS))}")
    return METRICS[name]
