"""Scores against worked examples of the official scripts, their odd cases included."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from tokenreduce.benchmarks.benchmark import Sample
from tokenreduce.benchmarks.scoring import (
    METRICS,
    anls,
    chosen_letter,
    circular_measures,
    exact_match,
    means_yes,
    metric_named,
    mme_match,
    mme_measures,
    multiple_choice,
    relaxed_accuracy,
    vqa_accuracy,
    vqa_normalised,
    yes_no,
    yes_no_measures,
)


def sample(number: int, answer: str, category: str = "all", image: str | None = None) -> Sample:
    return Sample(str(number), "?", (answer,), category, image or f"image-{number}")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("  A Dog ", "dog"),
        ("two", "2"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("1,000", "1000"),
        ("3.5.", "3.5"),
        ("U.S.A.", "usa"),
        ("dont", "don't"),
        ("shouldnt've", "shouldn't've"),
        ("somebody'd", "somebodyd"),
        ("Im", "im"),  # the official table has it in capitals only, after the text was made small
        ("dog's", "dog 's"),
        ("black-white", "black white"),
        ("black - white", "black white"),
        ("and/or", "and or"),
        ("$1,000-2,000", "$1000 2000"),
        ("what?", "what"),
        ("line\nbreak", "line break"),
        ("", ""),
    ],
)
def test_vqa_answers_are_normalised_as_on_the_official_server(answer: str, expected: str) -> None:
    assert vqa_normalised(answer) == expected


@pytest.mark.parametrize(("agreeing", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_leaves_every_person_out_once(agreeing: int, score: float) -> None:
    people = ["Red."] * agreeing + ["blue"] * (10 - agreeing)
    assert vqa_accuracy("the red", people) == pytest.approx(score)


def test_exact_match_takes_any_accepted_answer_and_nothing_near_it() -> None:
    assert exact_match("Couch.", ["sofa", "couch"]) == 1
    assert exact_match("couches", ["sofa", "couch"]) == 0
    assert exact_match("", ["sofa"]) == 0


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("Coca Cola", ["coca cola"], 1),
        ("coca  cola ", ["Coca Cola"], 1),
        ("1st", ["1st", "first"], 1),
        ("cola", ["coca cola"], 0),  # 5 of 9 wrong: below one half
        ("abcdef", ["abcxyz"], 0.5),  # one half exactly is kept by the script
        ("university", ["univercity", "college"], 0.9),
        ("", ["a"], 0),
        ("", [""], 1),
    ],
)
def test_anls(answer: str, accepted: Sequence[str], score: float) -> None:
    assert anls(answer, accepted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("answer", "accepted", "score"),
    [
        ("105", "100", 1),
        ("106", "100", 0),
        ("95", "100", 1),
        ("-95", "-100", 1),
        ("14.", "14", 1),
        ("7%", "0.07", 1),
        ("7", "7%", 0),  # a per cent is a hundredth
        ("0", "0", 1),
        ("0.01", "0", 0),  # nothing is within 5 % of zero
        ("1,000", "1000", 0),  # no number to the official code
        ("Yes", "yes", 1),
        ("Germany and France", "Germany", 0),
    ],
)
def test_relaxed_accuracy(answer: str, accepted: str, score: float) -> None:
    assert relaxed_accuracy(answer, [accepted]) == score


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("Yes", True),
        ("No", False),
        ("no.", False),
        ("There is not, sorry", False),
        ("Yes, and no. That is all", False),
        ("There is a dog. No cat.", True),
        ("NO", True),  # as in the official script, which knows No and no
        ("nothing", True),
        ("", True),
    ],
)
def test_popes_reading_of_an_answer(answer: str, yes: bool) -> None:
    assert means_yes(answer) == yes
    assert yes_no(answer, ["yes" if yes else "no"]) == 1
    assert yes_no(answer, ["no" if yes else "yes"]) == 0


def test_what_is_right_is_read_whatever_its_case() -> None:
    assert yes_no("No", ["NO."]) == 1 and yes_no("Yes", ["NO."]) == 0
    assert yes_no_measures(["No"], [sample(0, "NO")]) == {"F1": 0, "precision": 0, "recall": 0, "yes": 0}


def test_popes_measures_are_those_of_the_confusion_matrix() -> None:
    answers = ["yes"] * 5 + ["no"] * 3  # true positives 3, false positives 2, false negatives 1, true negatives 2
    samples = [sample(n, truth) for n, truth in enumerate(["yes"] * 3 + ["no"] * 2 + ["yes"] + ["no"] * 2)]
    assert yes_no_measures(answers, samples) == pytest.approx(
        {"F1": 100 * 6 / 9, "precision": 60, "recall": 75, "yes": 62.5}
    )
    assert yes_no_measures(["no"], [sample(0, "no")]) == {"F1": 0, "precision": 0, "recall": 0, "yes": 0}


@pytest.mark.parametrize(
    ("answer", "means"),
    [("Yes", "yes"), ("No.", "no"), ("y", "yes"), ("N", "no"), ("not", "no"), ("Answer: yes", ""), ("", ""), ("x", "")],
)
def test_mmes_reading_of_an_answer(answer: str, means: str) -> None:
    assert [mme_match(answer, [truth]) for truth in ("Yes", "No")] == [means == "yes", means == "no"]


def test_mme_adds_accuracy_and_accuracy_plus_over_categories() -> None:
    pairs = [
        ("count", "a", "Yes", "No"),  # both right
        ("count", "b", "Yes", "Yes"),  # one of two
        ("OCR", "c", "No", "Yes"),  # none
        ("code_reasoning", "d", "Yes", "No"),
        ("mine", "e", "Yes", "No"),
    ]
    answers, samples = [], []
    for category, image, *given in pairs:
        answers += given
        samples += [sample(0, truth, category, image) for truth in ("Yes", "No")]
    #                                                        count: 75 + 50; OCR: 0
    assert mme_measures(answers, samples) == {"perception": 125, "cognition": 200, "other": 200}
    assert mme_measures(answers[:5], samples[:5]) == {"perception": 125}  # half a pair says nothing of the pair


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B) a dog", "B"),
        ("The answer is B.", "B"),
        ("Answer: B", "B"),
        ("A or B", None),
        ("A dog in the park", None),
        ("A dog", "A"),
        ("a dog", None),
        ("", None),
    ],
)
def test_a_letter_is_read_as_mmbench_reads_it(answer: str, letter: str | None) -> None:
    assert chosen_letter(answer) == letter


def test_a_choice_is_right_by_letter_or_by_its_words() -> None:
    accepted = ("B", "a dog")
    assert multiple_choice("B. a cat", accepted) == 1
    assert multiple_choice("A dog.", ("B", "a dog")) == 0  # names letter A, to the official script too
    assert multiple_choice("a dog", accepted) == 1
    assert multiple_choice("a dog and a cat", accepted) == 0
    assert multiple_choice("", accepted) == 0


def test_mmbench_counts_a_question_that_is_right_in_every_order() -> None:
    rows = [(7, "A", "A"), (1_000_007, "B", "B."), (2_000_007, "C", "(C)"), (8, "A", "A"), (1_000_008, "B", "A")]
    samples = [sample(number, truth) for number, truth, _ in rows]
    assert circular_measures([answer for *_, answer in rows], samples) == {"circular": 50}
    with pytest.raises(ValueError, match="sample id 'x' is no number"):
        circular_measures(["A"], [Sample("x", "?", ("A",), "all", "i")])


def test_metrics_are_known_by_name() -> None:
    for name, metric in METRICS.items():
        assert metric_named(name) is metric
        accepted = ["yes"] * metric.fewest
        assert metric.score("yes", accepted) == 1
    with pytest.raises(ValueError, match="unknown metric 'anl': did you mean 'anls'"):
        metric_named("anl")
