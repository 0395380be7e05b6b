"""Arms of a study: the recipe of each arm, its options, starting model and searched texts.

Arms are data. A new recipe is an entry in RECIPES. A new arm is an entry in the configuration of a
study and needs no code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from optical.training.options import (
    AverageOptions,
    CodeswitchOptions,
    DistillOptions,
    Role,
    TeacherOptions,
    TransferOptions,
)

# Starting models other than arms.
TEACHER, ENCODER = "teacher", "encoder"


@dataclass
class BM25Options:
    """Options of an arm that searches with BM25."""

    k1: float = 1.2
    b: float = 0.75


@dataclass
class PretrainedOptions:
    """Options of an arm that searches with a model as it is.

    Attributes:
        model: Hugging Face name or folder; `{language}` in it is replaced by each language.
        query_prompt, document_prompt: text before each query and document; None keeps the model's.
    """

    model: str = ""
    query_prompt: str | None = None
    document_prompt: str | None = None


@dataclass
class EnsembleOptions:
    """Options of an arm whose score is the mean of the scores of other arms.

    Attributes:
        arms: two or more earlier arms that search with token vectors.
    """

    arms: list[str] = field(default_factory=list)


@dataclass
class NoOptions:
    """The (empty) options of an arm that uses the teacher unchanged."""


# Recipe -> its options class, and whether it makes a model.
RECIPES: dict[str, tuple[type[Any], bool]] = {
    "none": (NoOptions, False),
    "bm25": (BM25Options, False),
    "distill": (DistillOptions, True),
    "codeswitch": (CodeswitchOptions, True),
    "teacher": (TeacherOptions, True),
    "transfer": (TransferOptions, True),
    "average": (AverageOptions, True),
    "dense": (PretrainedOptions, False),
    "multivector": (PretrainedOptions, False),
    "ensemble": (EnsembleOptions, False),
}


@dataclass
class LexiconConfig:
    """A lexicon that the study induces from bitext.

    Attributes:
        bitext: files of parallel sentences.
        arm: arm whose transport plans give the lexicon; with "" it is learnt by IBM model 1.
        max_pairs: maximum number of pairs read from each file (None: all).
        least_probability, least_count: see ``optical.data.lexicon.induce``.
    """

    bitext: list[str] = field(default_factory=list)
    arm: str = ""
    max_pairs: int | None = None
    least_probability: float = 0.3
    least_count: int = 3


class StudyDefaults(Protocol):
    """The properties of a study that serve as defaults of its arms."""

    role: Role
    teacher_options: TeacherOptions | None
    lexicons: dict[str, LexiconConfig]


@dataclass
class ArmConfig:
    """One arm: a recipe with options, applied to every language and seed.

    Attributes:
        name: name of the arm in files and in the report.
        recipe: a key of RECIPES.
        options: options of the recipe. ``{language}`` in a value is replaced by each language.
        trainer_args: arguments of the trainer.
        encodes: "both": the model encodes queries and documents; "role": it encodes the texts of
            the student's role, and the teacher encodes the others.
        seeds: seeds of the arm; if empty, those of the study.
        multilingual: train one model for all languages instead of one model per language.
        start: models that training starts from: earlier arms, "teacher" or "encoder". Only the
            recipe "average" takes more than one.
        translate: "queries" or "documents" -> lexicon for word-by-word translation of these texts.
        replace: "queries" or "documents" -> file with these texts in another language.
    """

    name: str
    recipe: str
    options: dict[str, Any]
    trainer_args: dict[str, Any]
    encodes: str
    seeds: tuple[int, ...] = ()
    multilingual: bool = False
    start: tuple[str, ...] = ()
    translate: dict[str, str] = field(default_factory=dict)
    replace: dict[str, str] = field(default_factory=dict)

    @property
    def trains(self) -> bool:
        """Whether the recipe makes a model."""
        return RECIPES[self.recipe][1]

    @property
    def members(self) -> tuple[str, ...]:
        """The arms of which this arm is an ensemble."""
        return tuple(self.options.get("arms", ()))

    @property
    def has_vectors(self) -> bool:
        """Whether the arm searches with one model, in the vector space of the teacher."""
        return self.recipe not in ("bm25", "ensemble") and not self.pretrained

    @property
    def pretrained(self) -> bool:
        """Whether the arm searches with a model that is neither the teacher nor trained here."""
        return RECIPES[self.recipe][0] is PretrainedOptions

    def resolve_options(
        self,
        languages: str | Sequence[str],
        teacher: str,
        study: StudyDefaults,
        *,
        role: str = "",
        start: Sequence[str] = (),
        lexicon_path: Callable[[str, str], str] | None = None,
    ) -> Any:
        """Return the options of the recipe, or None for an arm without a model.

        Args:
            languages: one or more training languages.
            teacher: folder or name of the teacher.
            study: defaults of the study.
            role: role of the student; if empty, the role of the study.
            start: folders or names of the starting models; if empty, the teacher.
            lexicon_path: function from the name of an induced lexicon and a language to its file.
        """
        if not self.trains:
            return None
        languages = [languages] if isinstance(languages, str) else list(languages)
        role = role or study.role
        options = {key: fill_languages(value, languages) for key, value in self.options.items()}
        if "lexicon" in options:
            entries = [
                path
                for entry in self.options["lexicon"]
                for path in _lexicon_entries(entry, languages, study, lexicon_path)
            ]
            options["lexicon"] = list(dict.fromkeys(entries))
        if self.recipe == "average":
            return AverageOptions(**{"models": list(start), **options})
        model = start[0] if start else teacher
        if self.recipe == "distill":
            student = {"student": model} if start else {}
            return DistillOptions(**student | {"teacher": teacher, "role": role, **options})
        if self.recipe == "transfer":
            return TransferOptions(**{"model": model, **options})
        options = {"model": model, **self._teacher_defaults(study), **options}
        if self.recipe == "teacher":
            return TeacherOptions(**options)
        return CodeswitchOptions(**{"role": role, **options})

    def _teacher_defaults(self, study: StudyDefaults) -> dict[str, Any]:
        """Return the options of the study's teacher that this arm shares."""
        if study.teacher_options is None:
            return {}
        names = ["pairs", "queries", "passages", "scale"]
        if self.recipe == "teacher":
            # A new retriever has the same length limits as the teacher.
            names += ["query_length", "document_length", "query_expansion"]
            names += ["skip_frequent", "center"]
        return {name: getattr(study.teacher_options, name) for name in names}

    def induced_lexicons(self, study: StudyDefaults) -> list[str]:
        """Return the names of the lexicons that the study must induce for this arm."""
        names = [*self.options.get("lexicon", []), *self.translate.values()]
        return list(dict.fromkeys(name for name in names if name in study.lexicons))


def fill_languages(value: Any, languages: Sequence[str]) -> Any:
    """Replace ``{language}``; an entry of a list is repeated for every language."""
    if isinstance(value, list):
        filled = (text for entry in value for text in _fill_entry(entry, languages))
        return list(dict.fromkeys(filled))
    return value.replace("{language}", languages[0]) if isinstance(value, str) else value


def _fill_entry(entry: Any, languages: Sequence[str]) -> list[Any]:
    if not isinstance(entry, str):
        return [entry]
    return [entry.replace("{language}", language) for language in languages]


def _lexicon_entries(
    entry: str,
    languages: Sequence[str],
    study: StudyDefaults,
    lexicon_path: Callable[[str, str], str] | None,
) -> list[str]:
    """Return `language=file` for each language, for one lexicon of an arm."""
    if entry in study.lexicons:
        return [
            f"{language}={lexicon_path(entry, language) if lexicon_path else entry}"
            for language in languages
        ]
    if "=" in entry:
        return _fill_entry(entry, languages)
    return [f"{language}={entry.replace('{language}', language)}" for language in languages]
