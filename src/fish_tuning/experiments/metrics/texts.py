"""Metrics of generated texts against the texts of the data, which may be several per prompt."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import zip_longest

References = Sequence[Sequence[str]]
"""For each prediction, all the texts that count as right."""


def text_metrics(
    names: Sequence[str], predictions: Sequence[str], references: References, pattern: str | None
) -> dict[str, float]:
    """Compute some of `TEXT_METRICS`.

    Args:
        names: Which ones.
        predictions: The generated texts.
        references: For each of them, one or more texts to compare it with.
        pattern: What `exact_match` compares; see there.
    """
    compute: dict[str, Callable[[], float]] = {
        "exact_match": lambda: exact_match(predictions, references, pattern),
        "bleu": lambda: bleu(predictions, references),
        "rouge_l": lambda: rouge_l(predictions, references),
    }
    return {name: compute[name]() for name in names}


def exact_match(
    predictions: Sequence[str], references: References, pattern: str | None = None
) -> float:
    """Return the fraction of predictions whose answer is that of one of their references.

    Args:
        predictions: The generated texts.
        references: For each of them, one or more texts with the right answer.
        pattern: A regular expression that finds the answer; see `extract_answer`. By default, the
            whole text is the answer.
    """
    right = 0
    for prediction, texts in zip(predictions, references, strict=True):
        answer = extract_answer(prediction, pattern)
        right += answer is not None and answer in [extract_answer(text, pattern) for text in texts]
    return right / len(predictions)


def extract_answer(text: str, pattern: str | None) -> str | None:
    """Return the answer in a text: the first match's first group, or all of it without groups.

    White space around the answer and commas between its digits do not count.

    Args:
        text: A generated text or a reference.
        pattern: A regular expression; by default the whole text is the answer.

    Returns:
        The answer; None if the pattern does not occur.
    """
    if pattern is not None:
        found = re.search(pattern, text)
        if found is None:
            return None
        text = found[1] or "" if found.re.groups else found[0]
    return re.sub(r"(?<=\d),(?=\d)", "", text.strip())


def bleu(predictions: Sequence[str], references: References) -> float:
    """Return sacrebleu's corpus BLEU with its default settings, from 0 to 100."""
    from sacrebleu import corpus_bleu

    # The library takes the first reference of every prediction, then the second, and so on.
    return float(corpus_bleu(list(predictions), list(map(list, zip_longest(*references)))).score)


def rouge_l(predictions: Sequence[str], references: References) -> float:
    """Return rouge-score's ROUGE-L, from 0 to 1: the mean F-measure, without stemming.

    Of several references, the one with the highest F-measure counts.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    values = [
        scorer.score_multi(texts, prediction)["rougeL"].fmeasure
        for prediction, texts in zip(predictions, references, strict=True)
    ]
    return float(sum(values) / len(values))
