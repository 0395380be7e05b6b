"""The sentences of a report, computed from its statistics."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from optical.report.summary import Estimate, Gap, StudyDescription, Summary, measure_name

ALPHA = 0.05


def result_sentences(study: StudyDescription, summary: Summary) -> list[str]:
    """Return what each arm reaches, against the baseline and against the arms it starts from."""
    baseline = summary.arms[0]
    sentences = []
    for collection in summary.collections:
        for arm in summary.arms[1:]:
            if not summary.common_languages(collection, arm, baseline):
                continue
            starts = study.starts.get(arm, ())
            known_as = f"{baseline}, from which it starts" if baseline in starts else baseline
            sentences.append(_against_baseline(summary, collection, arm, baseline, known_as))
            sentences += [
                _against_start(summary, collection, arm, start)
                for start in starts
                if start != baseline and summary.common_languages(collection, arm, start)
            ]
    for gap in summary.gaps:
        sentences += _recovered(gap, baseline)
    return sentences


def _against_baseline(
    summary: Summary, collection: str, arm: str, baseline: str, known_as: str
) -> str:
    name = measure_name(summary.measure)
    languages = summary.common_languages(collection, arm, baseline)
    reached, start = (mean_over(summary, collection, a, languages) for a in (arm, baseline))
    total = len(summary.languages_of(collection))
    over = "the languages" if len(languages) == total else f"{len(languages)} of {total} languages"
    return (
        f"On {collection}, **{arm}** has a mean {name} of {reached:.3f} over {over} "
        f"({known_as}: {start:.3f}). {_verdict(summary, collection, arm, baseline)}"
    )


def _against_start(summary: Summary, collection: str, arm: str, start: str) -> str:
    name = measure_name(summary.measure)
    languages = summary.common_languages(collection, arm, start)
    reached, before = (mean_over(summary, collection, a, languages) for a in (arm, start))
    change = reached - before
    verb = "gains" if change > 0 else "loses" if change < 0 else "keeps the mean"
    amount = f" {abs(change):.3f} mean {name}" if change else ""
    return (
        f"On {collection}, **{arm}** {verb}{amount} over {start}, from which it starts. "
        f"{_verdict(summary, collection, arm, start)}"
    )


def _verdict(summary: Summary, collection: str, arm: str, against: str) -> str:
    """Return in how many languages an arm is significantly better or worse than another."""
    tested = summary.between(collection, arm, against)
    if not tested:
        return f"The two were not tested against each other, as `against` leaves out {against}."
    better = sum(p < ALPHA and difference > 0 for difference, p in tested)
    worse = sum(p < ALPHA and difference < 0 for difference, p in tested)
    counted = f"{len(tested)} languages (Holm-corrected p < {ALPHA})."
    if len(tested) == 1:
        verdict = "better than" if better else "worse than" if worse else "different from"
        known = "" if better or worse else "not "
        return f"It is {known}significantly {verdict} {against} (Holm-corrected p < {ALPHA})."
    if not worse and not better:
        return f"It is not significantly different from {against} in any of {counted}"
    if worse and not better:
        return f"It is significantly worse than {against} in {worse} of {counted}"
    loss = f", and significantly worse in {worse}," if worse else ""
    return f"It is significantly better than {against} in {better}{loss} of {counted}"


def _recovered(gap: Gap, baseline: str) -> list[str]:
    """Return what an arm recovers of the difference to English documents, if that is defined."""
    groups = ((gap.recovered_low, "low"), (gap.recovered_high, "high"))
    whole = f" of the difference between {baseline} and English documents"
    parts: list[str] = []
    for estimate, group in groups:
        if estimate:
            parts.append(
                f"{_part(estimate)}{'' if parts else whole} in the {group}-resource languages"
            )
    if not parts:
        return []
    return [
        f"On {gap.collection}, **{gap.arm}** {' and '.join(parts)}. The gap (high minus low) is "
        f"{signed(gap.gap)}."
    ]


def _part(estimate: Estimate) -> str:
    if estimate[0] < 0:
        value, low, high = estimate
        return f"loses a further {share((-value, -high, -low))}"
    return f"recovers {share(estimate)}"


def error_rate_caption(study: StudyDescription) -> str:
    """Return the caption of the alignment error rates, with the pairs that arms learnt from."""
    text = (
        "Alignment error rate of the transport plans between the model of an arm and the teacher, "
        "measured against the lexicon. Mean over seeds. "
    )
    if not study.trained_pairs:
        return text + "Whether an arm was trained on the sentence pairs was not checked."
    seen = {language: counts for language, counts in study.trained_pairs.items() if counts[0]}
    total = sum(pairs for _, pairs in study.trained_pairs.values())
    if not seen:
        return text + f"No model of the study was trained on any of the {total} sentence pairs."
    listed = ", ".join(
        f"{trained} of {pairs} in {study.name_of(language)}"
        for language, (trained, pairs) in seen.items()
    )
    return text + (
        f"Models of the study were trained on some of the sentence pairs ({listed}), so these "
        "rates do not hold for new sentences."
    )


def mean_over(summary: Summary, collection: str, arm: str, languages: Sequence[str]) -> float:
    """Return the mean of the first measure of an arm over languages that it searched."""
    means = summary.means[summary.measure]
    return float(np.mean([means[collection, arm, language] for language in languages]))


def signed(estimate: Estimate) -> str:
    """Return an estimate with its interval, both with their sign."""
    value, low, high = estimate
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"


def share(estimate: Estimate) -> str:
    """Return an estimate with its interval in per cent."""
    value, low, high = estimate
    return f"{value:.0%} [{low:.0%}, {high:.0%}]"
