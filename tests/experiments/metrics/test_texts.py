"""Metrics of generated texts equal what the libraries give on texts written by hand."""

import pytest

from fish_tuning.experiments.metrics.texts import (
    bleu,
    exact_match,
    extract_answer,
    rouge_l,
    text_metrics,
)

sacrebleu = pytest.importorskip("sacrebleu")
rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer")

PREDICTIONS = [
    "The Eagle is a cheap coffee shop by the river.",
    "Blue Spice serves Chinese food in the city centre.",
    "There is a pub.",
]
REFERENCES = [
    [
        "The Eagle is a cheap coffee shop near the river.",
        "By the river is The Eagle, a coffee shop.",
    ],
    ["Blue Spice is a Chinese restaurant in the city centre."],
    ["A pub called Alimentum is in the riverside area.", "There is a pub.", "Alimentum is a pub."],
]


def test_bleu_is_that_of_sacrebleu():
    """Guards the order of references, of which predictions have different numbers."""
    single = [[texts[0] for texts in REFERENCES]]
    expected = sacrebleu.corpus_bleu(PREDICTIONS, single).score
    assert bleu(PREDICTIONS, [texts[:1] for texts in REFERENCES]) == expected
    several = sacrebleu.BLEU().corpus_score(
        PREDICTIONS,
        [
            [REFERENCES[0][0], REFERENCES[1][0], REFERENCES[2][0]],
            [REFERENCES[0][1], None, REFERENCES[2][1]],
            [None, None, REFERENCES[2][2]],
        ],
    )
    assert bleu(PREDICTIONS, REFERENCES) == several.score > expected


def test_rouge_is_that_of_rouge_score():
    """Guards the mean over predictions, and the best of several references."""
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    values = [
        max(scorer.score(text, prediction)["rougeL"].fmeasure for text in texts)
        for prediction, texts in zip(PREDICTIONS, REFERENCES, strict=True)
    ]
    assert rouge_l(PREDICTIONS, REFERENCES) == pytest.approx(sum(values) / 3, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("so 2 + 2 = 4\n#### 4", r"#### (\d+)", "4"),
        ("#### 4\nagain\n#### 5", r"#### (\d+)", "4"),
        ("#### 1,234 ", r"#### (-?[\d.,]+)", "1234"),
        ("no answer", r"#### (\d+)", None),
        ("it is 42.", r"\d+", "42"),
        ("  yes \n", None, "yes"),
    ],
)
def test_the_answer_is_extracted(text, pattern, answer):
    """Guards the first match, its group, white space and commas between digits."""
    assert extract_answer(text, pattern) == answer


def test_exact_match_counts_any_reference():
    """Guards predictions without an answer, which never match."""
    references = [["#### 4"], ["#### 5", "#### 6"], ["#### 7"]]
    predictions = ["#### 4", "#### 6", "seven"]
    assert exact_match(predictions, references, r"#### (\d+)") == pytest.approx(2 / 3)
    found = text_metrics(["exact_match"], predictions, references, r"#### (\d+)")
    assert found == {"exact_match": pytest.approx(2 / 3)}
