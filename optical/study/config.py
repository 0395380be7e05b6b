"""A study's configuration: one YAML file, every key checked by name before anything runs."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from sentence_transformers import MultiVectorEncoderTrainingArguments

from optical.io.settings import nearest, parse_yaml, read_layered, typed
from optical.models.encoding import ROLES
from optical.retrieval.evaluation import DEFAULT_MEASURES
from optical.study.arms import ENCODER, RECIPES, TEACHER, ArmConfig, LexiconConfig
from optical.training.options import AT_ONCE, TeacherOptions
from optical.training.pretraining import EncoderOptions

COLLECTION_KEYS = ("source", "queries", "documents", "qrels", "role", "languages")
SIDES = ("queries", "documents")
ALIGNMENT_KEYS = ("language", "english", "other")
NOT_FOR_STUDIES = ("output_dir", "seed", "disable_tqdm")


@dataclass
class StudyConfig:
    """The keys of a study's YAML file; docs/study.md describes them with an example."""

    title: str
    output: Path
    languages: tuple[str, ...]
    collections: dict[str, dict[str, str]]
    arms: list[ArmConfig]
    low: tuple[str, ...] = ()
    high: tuple[str, ...] = ()
    names: dict[str, str] = field(default_factory=dict)
    note: str = ""
    role: str = "document"
    seeds: tuple[int, ...] = (0,)
    encoder: str = ""
    encoder_options: EncoderOptions | None = None
    encoder_arguments: dict[str, Any] = field(default_factory=dict)
    teacher: str = ""
    teacher_options: TeacherOptions | None = None
    teacher_arguments: dict[str, Any] = field(default_factory=dict)
    lexicons: dict[str, LexiconConfig] = field(default_factory=dict)
    # Collections that exist in some languages only.
    collection_languages: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # Folder of the report inside of the output folder.
    report: str = ""
    # Vectors of the teacher are written once per text and shared by all arms and seeds.
    store_teacher: bool = False
    passage_length: int | None = None
    passage_stride: int | None = None
    # Arms that every other arm is tested against; all earlier ones when empty.
    against: tuple[str, ...] = ()
    # The arm whose relative gain is asked for: a translation baseline.
    translation: str = ""
    # Name of a curve -> its arms, from few pairs to many.
    curves: dict[str, tuple[str, ...]] = field(default_factory=dict)
    word_alignment: dict[str, Any] | None = None
    measures: tuple[str, ...] = DEFAULT_MEASURES
    ceiling: tuple[str, ...] = ("en",)
    alignment: dict[str, str] | None = None
    phrasebook: bool = False
    text: str = ""

    def resource(self, language: str) -> str:
        """Group of a language: "low", "high", or "" where the configuration names none."""
        return "low" if language in self.low else "high" if language in self.high else ""

    def role_of(self, collection: str) -> str:
        """What the student reads in a collection: "query" or "document"."""
        return self.collections[collection].get("role", self.role)

    def languages_of(self, collection: str) -> tuple[str, ...]:
        """The languages that a collection has files for, those of the ceiling among them."""
        return self.collection_languages.get(collection, (*self.languages, *self.ceiling))

    @property
    def roles(self) -> list[str]:
        """The roles of all collections, the study's own first."""
        found = {self.role_of(name) for name in self.collections}
        return sorted(found, key=lambda role: role != self.role)

    def arm(self, name: str) -> ArmConfig:
        return next(arm for arm in self.arms if arm.name == name)


def read_config(path: str | Path | None, output: str | Path | None = None) -> StudyConfig:
    """Read and check a configuration; None reads the embedded demonstration.

    ``${NAME}`` stands for an environment variable, ``{language}`` for each language in turn. Paths
    that begin with ``./`` or ``../`` are relative to the configuration file, others to the current
    folder, and so is the output folder. ``base`` names a file beside this one that is read first;
    keys of this one go on top, level by level.

    Raises:
        FileNotFoundError, ValueError: no such file, not YAML, an unknown key (with the nearest
            known one), a missing key, an unset variable, a value of the wrong kind.
    """
    variables = dict(os.environ)
    if path is None:
        source = resources.files("optical") / "phrasebook" / "study.yaml"
        text, place, folder = source.read_text(encoding="utf-8"), "embedded study", Path()
        output = output or "runs/phrasebook"
        variables["PHRASEBOOK"] = str(Path(output) / "data")
        raw = parse_yaml(text, place)
    else:
        raw, text = read_layered(Path(path))
        place, folder = str(path), Path(path).parent
    reader = _Reader(place, folder, variables)
    config = reader.study(reader.expand(raw), output)
    config.phrasebook = path is None
    config.text = text
    return config


@dataclass
class _Reader:
    place: str
    folder: Path
    variables: Mapping[str, str]

    def expand(self, value: Any) -> Any:
        """Put environment variables into every string."""
        if isinstance(value, dict):
            return {key: self.expand(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.expand(entry) for entry in value]
        if isinstance(value, str):
            return re.sub(r"\$\{(\w+)\}", self._variable, value)
        return value

    def _variable(self, match: re.Match[str]) -> str:
        name = match.group(1)
        if name not in self.variables:
            raise ValueError(
                f"{self.place}: the environment variable {name} is not set; "
                f"set it to the folder of the data, `export {name}=...`"
            )
        return self.variables[name]

    def study(self, raw: dict[str, Any], output: str | Path | None) -> StudyConfig:
        keys = {
            entry.name
            for entry in dataclasses.fields(StudyConfig)
            if not entry.name.endswith(("_options", "_arguments"))
            and entry.name not in ("phrasebook", "text", "collection_languages")
        }
        self.known(raw, keys | {"arguments"}, "the study")
        for key in ("languages", "collections", "arms", "teacher"):
            if not raw.get(key):
                raise ValueError(f"{self.place}: no key `{key}`; it is required")
        if not (output or raw.get("output")):
            raise ValueError(f"{self.place}: no key `output`, and no --output given")
        common = self.arguments(raw.get("arguments"), "arguments")
        languages = self.words(raw["languages"], "languages")
        collections = self.collections(raw["collections"])
        config = StudyConfig(
            title=str(raw.get("title", Path(self.place).stem)),
            output=Path(output or raw["output"]),
            languages=languages,
            collections=collections,
            arms=[],
            collection_languages={
                str(name): self.words(parts["languages"], f"collections.{name}.languages")
                for name, parts in raw["collections"].items()
                if "languages" in parts
            },
            report=str(raw.get("report") or ""),
            low=self.words(raw.get("low", []), "low"),
            high=self.words(raw.get("high", []), "high"),
            names={
                str(key): str(name)
                for key, name in self.mapping(raw.get("names") or {}, "names").items()
            },
            note=str(raw.get("note", "")),
            role=self.one_of(raw.get("role", "document"), ROLES, "role"),
            seeds=self.numbers(raw.get("seeds", [0]), "seeds"),
            measures=self.words(raw.get("measures", DEFAULT_MEASURES), "measures"),
            ceiling=self.words(raw.get("ceiling", ["en"]), "ceiling"),
            alignment=raw.get("alignment"),
            store_teacher=self.typed(raw.get("store_teacher", False), bool, "store_teacher"),
            passage_length=self.typed(raw.get("passage_length"), int | None, "passage_length"),
            passage_stride=self.typed(raw.get("passage_stride"), int | None, "passage_stride"),
            lexicons={
                str(name): self.recipe(entry, LexiconConfig, {}, f"lexicons.{name}")[0]
                for name, entry in self.mapping(raw.get("lexicons") or {}, "lexicons").items()
            },
        )
        for group in ("low", "high"):
            for language in getattr(config, group):
                self.one_of(language, languages, group)
        for name, found in config.collection_languages.items():
            for language in found:
                accepted = (*languages, *config.ceiling)
                self.one_of(language, accepted, f"collections.{name}.languages")
        if isinstance(raw.get("encoder"), dict):
            config.encoder_options, config.encoder_arguments = self.recipe(
                raw["encoder"], EncoderOptions, {}, "encoder"
            )
        else:
            config.encoder = self.located(str(raw.get("encoder") or ""))
        if isinstance(raw["teacher"], dict):
            if not raw.get("encoder") and "model" not in raw["teacher"]:
                raise ValueError(f"{self.place}: no key `encoder` for the teacher to start from")
            config.teacher_options, config.teacher_arguments = self.recipe(
                raw["teacher"], TeacherOptions, common, "teacher"
            )
            if not config.encoder_options:
                config.encoder = config.encoder or config.teacher_options.model
        else:
            config.teacher = self.located(str(raw["teacher"]))
        arms = self.mapping(raw["arms"], "arms")
        taught = config.teacher_arguments or common
        config.arms = [self.arm(str(name), arm, common, taught) for name, arm in arms.items()]
        if len({arm.name.lower() for arm in config.arms}) < len(config.arms):
            raise ValueError(f"{self.place}: arms: two names differ in capitals only")
        self.references(config, raw)
        if config.alignment is not None:
            known = (*ALIGNMENT_KEYS, "arm")
            self.known(self.mapping(config.alignment, "alignment"), known, "alignment")
            for key in ALIGNMENT_KEYS:
                if key not in config.alignment:
                    raise ValueError(f"{self.place}: alignment: no key `{key}`; it is required")
            self.one_of(config.alignment.get("language"), languages, "alignment.language")
            distilled = [arm.name for arm in config.arms if arm.recipe == "distill"]
            if "arm" in config.alignment:
                self.one_of(config.alignment["arm"], distilled, "alignment.arm")
        return config

    def references(self, config: StudyConfig, raw: dict[str, Any]) -> None:
        """Check and read what names arms and word tables, now that all are known."""
        names = [arm.name for arm in config.arms]
        trained = [arm.name for arm in config.arms if arm.trains]
        config.against = self.words(raw.get("against", []), "against")
        for name in config.against:
            self.one_of(name, names, "against")
        if raw.get("translation"):
            config.translation = self.one_of(raw["translation"], names, "translation")
        for curve, members in self.mapping(raw.get("curves") or {}, "curves").items():
            config.curves[str(curve)] = self.words(members, f"curves.{curve}")
            for name in config.curves[str(curve)]:
                self.one_of(name, trained, f"curves.{curve}")
        for table, made in config.lexicons.items():
            if made.arm:
                self.one_of(made.arm, trained, f"lexicons.{table}.arm")
        earlier: list[str] = []
        for arm in config.arms:
            for name in arm.start:
                accepted = [*earlier] if arm.recipe == "average" else [TEACHER, ENCODER, *earlier]
                self.one_of(name, accepted, f"arms.{arm.name}.start")
                if name == ENCODER and not (config.encoder or config.encoder_options):
                    raise ValueError(f"{self.place}: no key `encoder` for arms.{arm.name} to start")
                start = config.arm(name) if name in earlier else arm
                if arm.multilingual and not start.multilingual:
                    raise ValueError(
                        f"{self.place}: arms.{arm.name} is multilingual but starts from "
                        f"{name}, which has a model for each language"
                    )
            for table in arm.lexicons(config):
                made = config.lexicons[table]
                if made.arm and made.arm not in earlier:
                    raise ValueError(
                        f"{self.place}: arms.{arm.name}: the table {table} is read off the arm "
                        f"{made.arm}, which must stand before it"
                    )
            if arm.trains:
                earlier.append(arm.name)
        if raw.get("word_alignment") is not None:
            place = "word_alignment"
            found = dict(self.mapping(raw[place], place))
            self.known(found, ("bitext", "lexicon", "max_pairs"), place)
            for key in ("bitext", "lexicon"):
                if not isinstance(found.get(key), str):
                    raise ValueError(f"{self.place}: {place}: no key `{key}` with a name or file")
                found[key] = self.located(found[key])
            found["max_pairs"] = self.typed(found.get("max_pairs", 200), int, f"{place}.max_pairs")
            config.word_alignment = found

    def arm(self, name: str, raw: Any, common: dict[str, Any], taught: dict[str, Any]) -> ArmConfig:
        place = f"arms.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(
                f"{self.place}: arms: {name!r}, expected a name of letters, digits, `-` and `_`, "
                "because files are called by it"
            )
        raw = dict(self.mapping(raw or {}, place))
        recipe = self.one_of(raw.pop("recipe", "none"), tuple(RECIPES), f"{place}.recipe")
        kind, trains = RECIPES[recipe]
        # These leave the other side to the teacher, so an index of it stays valid.
        default = "role" if recipe in ("distill", *AT_ONCE) else "both"
        arm = ArmConfig(
            name,
            recipe,
            {},
            {},
            self.one_of(raw.pop("encodes", default), ("both", "role"), f"{place}.encodes"),
            translate=self.sides(raw.pop("translate", {}), f"{place}.translate"),
            replace=self.sides(raw.pop("replace", {}), f"{place}.replace"),
        )
        if trains:
            if recipe not in AT_ONCE:
                own = self.arguments(raw.pop("arguments", None), f"{place}.arguments")
                arm.arguments = {**(taught if recipe == "teacher" else common), **own}
            if "seeds" in raw:
                arm.seeds = self.numbers(raw.pop("seeds"), f"{place}.seeds")
            # A retriever taught in English alone is the same for every language.
            arm.multilingual = self.typed(
                raw.pop("multilingual", recipe == "teacher"), bool, f"{place}.multilingual"
            )
            start = raw.pop("start", [ENCODER] if recipe == "teacher" else [])
            arm.start = self.words([start] if isinstance(start, str) else start, f"{place}.start")
            wanted = "two arms or more" if recipe == "average" else "one name at most"
            if (len(arm.start) > 1) != (recipe == "average"):
                raise ValueError(f"{self.place}: {place}.start: {start!r}, expected {wanted}")
        arm.settings = self.settings(raw, kind, place)
        return arm

    def sides(self, raw: Any, place: str) -> dict[str, str]:
        self.known(self.mapping(raw, place), SIDES, place)
        return {str(side): self.located(str(value)) for side, value in raw.items()}

    def recipe(
        self, raw: dict[str, Any], kind: type[Any], common: dict[str, Any], place: str
    ) -> tuple[Any, dict[str, Any]]:
        raw = dict(self.mapping(raw, place))
        arguments = self.arguments(raw.pop("arguments", None), f"{place}.arguments")
        return kind(**self.settings(raw, kind, place)), {**common, **arguments}

    def settings(self, raw: dict[str, Any], kind: type[Any], place: str) -> dict[str, Any]:
        hints = get_type_hints(kind)
        self.known(raw, hints.keys() - {"resume"}, place)
        settings = {}
        for key, value in raw.items():
            # A single file may be written without the brackets of a list.
            if hints[key] == list[str] and isinstance(value, str):
                value = [value]
            settings[key] = self.located(self.typed(value, hints[key], f"{place}.{key}"))
        return settings

    def typed(self, value: Any, hint: Any, place: str) -> Any:
        return typed(value, hint, f"{self.place}: {place}")

    def mapping(self, raw: Any, place: str) -> dict[str, Any]:
        if not isinstance(raw, dict):
            raise ValueError(f"{self.place}: {place}: expected keys and values, found {raw!r}")
        return raw

    def located(self, value: Any) -> Any:
        """Relative paths become relative to the configuration file."""
        if isinstance(value, list):
            return [self.located(entry) for entry in value]
        if not isinstance(value, str):
            return value
        # A lexicon is written `language=file`.
        head, equals, path = value.rpartition("=")
        return head + equals + str(self.folder / path) if path.startswith(("./", "../")) else value

    def collections(self, raw: Any) -> dict[str, dict[str, str]]:
        if not isinstance(raw, dict):
            raise ValueError(f"{self.place}: collections: expected names with their files")
        for name, parts in raw.items():
            place = f"collections.{name}"
            self.known(self.mapping(parts, place), COLLECTION_KEYS, place)
            if "role" in parts:
                self.one_of(parts["role"], ROLES, f"{place}.role")
        return {
            str(name): {
                key: self.located(str(value)) for key, value in parts.items() if key != "languages"
            }
            for name, parts in raw.items()
        }

    def arguments(self, raw: Any, place: str) -> dict[str, Any]:
        hints = get_type_hints(MultiVectorEncoderTrainingArguments)
        fields = {entry.name for entry in dataclasses.fields(MultiVectorEncoderTrainingArguments)}
        raw = self.mapping(raw or {}, place)
        self.known(raw, fields - set(NOT_FOR_STUDIES), place)
        return {key: self.typed(value, hints[key], f"{place}.{key}") for key, value in raw.items()}

    def known(self, raw: Mapping[str, Any], keys: Iterable[str], place: str) -> None:
        for key in raw:
            if key not in keys:
                raise ValueError(
                    f"{self.place}: unknown key `{key}` in {place}{nearest(key, keys)}"
                )

    def one_of(self, value: Any, wanted: Iterable[str], place: str) -> str:
        if value not in wanted:
            raise ValueError(f"{self.place}: {place}: {value!r}, expected {' or '.join(wanted)}")
        return str(value)

    def words(self, raw: Any, place: str) -> tuple[str, ...]:
        if isinstance(raw, str) or not isinstance(raw, (list, tuple)):
            raise ValueError(f"{self.place}: {place}: {raw!r}, expected a list")
        # YAML reads the code of Norwegian as False.
        return tuple("no" if word is False else str(word) for word in raw)

    def numbers(self, raw: Any, place: str) -> tuple[int, ...]:
        numbers = raw if isinstance(raw, list) else [raw]
        if not numbers or not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"{self.place}: {place}: {raw!r}, expected whole numbers")
        return tuple(numbers)
