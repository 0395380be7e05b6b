"""A study's arms: what each one starts from, learns from, reads and searches with.

An arm is data. A recipe that is new is a line in RECIPES; an arm that is new is a few lines of a
study's configuration, and no code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from optical.training.options import (
    AverageOptions,
    CodeswitchOptions,
    DistillOptions,
    TeacherOptions,
    TransferOptions,
)

# Names of things that an arm may start from beside other arms.
TEACHER, ENCODER = "teacher", "encoder"


@dataclass
class BM25Options:
    """Options of an arm that searches words instead of vectors."""

    k1: float = 1.2
    b: float = 0.75


@dataclass
class NoOptions:
    """An arm that is the teacher as it is."""


# Recipe: its options, and whether it makes a model.
RECIPES: dict[str, tuple[type[Any], bool]] = {
    "none": (NoOptions, False),
    "bm25": (BM25Options, False),
    "distill": (DistillOptions, True),
    "codeswitch": (CodeswitchOptions, True),
    "teacher": (TeacherOptions, True),
    "transfer": (TransferOptions, True),
    "average": (AverageOptions, True),
}


@dataclass
class LexiconConfig:
    """A word table that the study makes of parallel sentences.

    Attributes:
        bitext: files of parallel sentences.
        arm: whose transport plans give the table; "" learns it by IBM model 1.
        max_pairs: the first so many pairs of each file; all when None.
        least_probability, least_count: see ``optical.data.lexicon.induce_lexicon``.
    """

    bitext: list[str] = field(default_factory=list)
    arm: str = ""
    max_pairs: int | None = None
    least_probability: float = 0.3
    least_count: int = 3


class Defaults(Protocol):
    """What an arm takes from its study where it says nothing itself."""

    role: str
    teacher_options: TeacherOptions | None
    lexicons: dict[str, LexiconConfig]


@dataclass
class ArmConfig:
    """One arm: a recipe with its options, applied to every language and seed.

    Attributes:
        name: how files and the report call it.
        recipe: a key of RECIPES.
        settings: options of the recipe; ``{language}`` in them is each language in turn.
        arguments: arguments of its trainer.
        encodes: "both": the model reads queries and documents; "role": the teacher keeps the other
            side.
        seeds: its own seeds; the study's when empty.
        multilingual: one model for all languages in place of one for each.
        start: what the model is made from: an earlier arm, "teacher" or "encoder"; several arms
            where their average is taken.
        translate: "queries" or "documents" -> the word table that translates them.
        replace: "queries" or "documents" -> a file with these texts in another language.
    """

    name: str
    recipe: str
    settings: dict[str, Any]
    arguments: dict[str, Any]
    encodes: str
    seeds: tuple[int, ...] = ()
    multilingual: bool = False
    start: tuple[str, ...] = ()
    translate: dict[str, str] = field(default_factory=dict)
    replace: dict[str, str] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        return RECIPES[self.recipe][1]

    def options(
        self,
        language: str | Sequence[str],
        teacher: str,
        config: Defaults,
        *,
        role: str = "",
        start: Sequence[str] = (),
        lexicon: Callable[[str, str], str] | None = None,
    ) -> Any:
        """The recipe's options for one language or several, or None for an arm without training.

        Args:
            language: the languages that the model is trained on.
            teacher: folder or name of the teacher.
            config: the study.
            role: what the student reads; the study's role when empty.
            start: models to start from; the teacher when empty.
            lexicon: path of a word table that the study makes, by its name and a language.
        """
        if not self.trains:
            return None
        languages = [language] if isinstance(language, str) else list(language)
        role = role or config.role
        settings = {key: filled(value, languages) for key, value in self.settings.items()}
        named = (
            path
            for entry in self.settings.get("lexicon", [])
            for path in _lexicons(entry, languages, config, lexicon)
        )
        if "lexicon" in settings:
            settings["lexicon"] = list(dict.fromkeys(named))
        if self.recipe == "average":
            return AverageOptions(**{"models": list(start), **settings})
        model = start[0] if start else teacher
        if self.recipe == "distill":
            chosen = {"teacher": teacher, "role": role, **settings}
            return DistillOptions(**({"student": model} if start else {}) | chosen)
        if self.recipe == "transfer":
            return TransferOptions(**{"model": model, **settings})
        taught = config.teacher_options
        names = ["pairs", "queries", "passages", "scale"]
        if self.recipe == "teacher":
            # An arm that is a retriever of its own reads as the teacher does.
            names += ["query_length", "document_length", "query_expansion", "skip_frequent"]
        shared = {name: getattr(taught, name) for name in names} if taught else {}
        chosen = {"model": model, **shared, **settings}
        if self.recipe == "teacher":
            return TeacherOptions(**chosen)
        return CodeswitchOptions(**{"sides": role, **chosen})

    def lexicons(self, config: Defaults) -> list[str]:
        """Names of the word tables that the study must make for this arm."""
        used = [*self.settings.get("lexicon", []), *self.translate.values()]
        return list(dict.fromkeys(name for name in used if name in config.lexicons))


def filled(value: Any, languages: Sequence[str]) -> Any:
    """Put languages in: a list that names ``{language}`` gets an entry for each of them."""
    if isinstance(value, list):
        return list(dict.fromkeys(entry for part in value for entry in _each(part, languages)))
    return value.replace("{language}", languages[0]) if isinstance(value, str) else value


def _each(entry: Any, languages: Sequence[str]) -> list[Any]:
    if not isinstance(entry, str):
        return [entry]
    return [entry.replace("{language}", language) for language in languages]


def _lexicons(
    entry: str,
    languages: Sequence[str],
    config: Defaults,
    path: Callable[[str, str], str] | None,
) -> list[str]:
    """`language=file` for each language, of one entry in an arm's lexicons."""
    if entry in config.lexicons:
        return [f"{one}={path(entry, one) if path else entry}" for one in languages]
    if "=" in entry:
        return _each(entry, languages)
    return [f"{one}={entry.replace('{language}', one)}" for one in languages]


def pairs_read(arm: ArmConfig, language: str) -> Mapping[str, Any]:
    """Which parallel sentences of a language an arm learns from, for the curve of their number."""
    return {
        "bitext": filled(arm.settings.get("bitext", []), [language]),
        "max_pairs": arm.settings.get("max_pairs"),
    }
