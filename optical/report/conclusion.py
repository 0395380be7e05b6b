"""The conclusion of a report: three sentences, computed from its statistics."""

from __future__ import annotations

from collections.abc import Sequence

from optical.report.sentences import ALPHA, mean_over, signed
from optical.report.summary import StudyDescription, Summary, measure_name


def conclusion(study: StudyDescription, summary: Summary) -> list[str]:
    """Return three sentences: the best arm, what training adds, and the gap between languages.

    Arms count as better or worse only where the corrected test says so.
    """
    best = {name: arm for name in summary.collections if (arm := _best_arm(summary, name))}
    if not best:
        return []
    return [_best(summary, best), _trained(study, summary), _gap(study, summary, best)]


def _best_arm(summary: Summary, collection: str) -> str:
    """Return the arm with the highest mean over the languages, of the arms that searched all."""
    languages = summary.languages_of(collection)
    complete = [
        arm for arm in summary.arms if summary.common_languages(collection, arm) == languages
    ]
    return max(complete, key=lambda arm: mean_over(summary, collection, arm, languages), default="")


def _best(summary: Summary, best: dict[str, str]) -> str:
    name = measure_name(summary.measure)
    parts = []
    for collection, arm in best.items():
        languages = summary.languages_of(collection)
        mean = mean_over(summary, collection, arm, languages)
        baseline = summary.arms[0]
        part = f"**{arm}** is best on {collection} with a mean {name} of {mean:.3f}"
        if arm != baseline and summary.common_languages(collection, baseline) == languages:
            part += f" ({baseline}: {mean_over(summary, collection, baseline, languages):.3f})"
        parts.append(part + _runner_up(summary, collection, arm, languages))
    return "; ".join(parts) + "."


def _runner_up(summary: Summary, collection: str, arm: str, languages: Sequence[str]) -> str:
    """Return the arm that is next to the best one, and where it is significantly below it."""
    others = [
        other
        for other in summary.arms
        if other != arm and summary.common_languages(collection, other) == languages
    ]
    if not others:
        return ""
    following = max(others, key=lambda other: mean_over(summary, collection, other, languages))
    mean = mean_over(summary, collection, following, languages)
    tested = summary.between(collection, arm, following)
    if not tested:
        return f", and {following} is next with {mean:.3f}, which was not tested"
    below = sum(p < ALPHA and difference > 0 for difference, p in tested)
    if len(tested) == 1:
        verdict = "significantly below" if below else "not significantly below"
    else:
        verdict = f"significantly below in {below or 'none'} of {len(tested)} languages"
    return f", and {following} is next with {mean:.3f}, {verdict}"


def _trained(study: StudyDescription, summary: Summary) -> str:
    """Return which arms are better and which worse than what they start from."""
    verdicts: dict[str, list[str]] = {}
    counted = False
    for arm in summary.arms:
        for start in study.starts.get(arm, ()):
            found = [x for c in summary.collections for x in summary.between(c, arm, start)]
            if not found:
                continue
            gains = sum(p < ALPHA and difference > 0 for difference, p in found)
            losses = sum(p < ALPHA and difference < 0 for difference, p in found)
            if gains and losses:
                verdict = "partly better and partly worse"
                count = f", {gains} and {losses} of {len(found)}"
            elif gains or losses:
                verdict = f"significantly {'better' if gains else 'worse'}"
                count = f", {gains or losses} of {len(found)}"
            else:
                verdict, count = "without a significant difference", ""
            if len(found) == 1:
                count = ""
            counted = counted or bool(count)
            verdicts.setdefault(verdict, []).append(f"{arm} ({start}{count})")
    if not verdicts:
        return "No trained arm can be set against an arm that it starts from."
    parts = [f"{verdict}: {', '.join(found)}" for verdict, found in verdicts.items()]
    where = "languages" if len(summary.collections) == 1 else "pairs of collection and language"
    number = f", with the number of {where}" if counted else ""
    return (
        f"Against what they start from (in parentheses{number}; Holm-corrected p < {ALPHA}), the "
        f"trained arms are {'; '.join(parts)}."
    )


def _gap(study: StudyDescription, summary: Summary, best: dict[str, str]) -> str:
    """Return the gap of the best arm on each collection, or its range without groups."""
    name = measure_name(summary.measure)
    gaps = {(gap.collection, gap.arm): gap for gap in summary.gaps}
    parts = []
    for collection, arm in best.items():
        gap, first = gaps.get((collection, arm)), gaps.get((collection, summary.arms[0]))
        if gap is None or first is None:
            parts.append(_range(study, summary, collection, arm))
        elif gap.narrowed is None:
            parts.append(
                f"with {arm} the high-resource languages of {collection} are {signed(gap.gap)} "
                f"{name} above the low-resource ones"
            )
        else:
            value, low, high = gap.narrowed
            change = "narrower" if low > 0 else "wider" if high < 0 else ""
            verdict = (
                f"{change} by {abs(value):.3f} than with"
                if change
                else "not significantly different from that with"
            )
            parts.append(
                f"the gap between high- and low-resource languages on {collection} is "
                f"{signed(gap.gap)} with {arm}, {verdict} {first.arm} ({signed(first.gap)})"
            )
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def _range(study: StudyDescription, summary: Summary, collection: str, arm: str) -> str:
    means = summary.means[summary.measure]
    languages = sorted(
        summary.languages_of(collection), key=lambda language: means[collection, arm, language]
    )
    ends = [
        f"{means[collection, arm, language]:.3f} in {study.name_of(language)}"
        for language in dict.fromkeys((languages[0], languages[-1]))
    ]
    return f"with {arm}, {measure_name(summary.measure)} on {collection} is {' to '.join(ends)}"
