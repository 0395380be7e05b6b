"""A study's configuration: one YAML file, every key checked by name before anything runs."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from sentence_transformers import MultiVectorEncoderTrainingArguments

from optical.encoder import EncoderOptions
from optical.evaluation import DEFAULT_MEASURES
from optical.files import read_lines
from optical.training import (
    ROLES,
    CodeswitchOptions,
    DistillOptions,
    TeacherOptions,
)

RECIPES: dict[str, type[Any] | None] = {
    "none": None,
    "distill": DistillOptions,
    "codeswitch": CodeswitchOptions,
}
COLLECTION_KEYS = ("source", "queries", "documents", "qrels")
ALIGNMENT_KEYS = ("language", "english", "other")
PLAIN: dict[Any, Any] = {
    bool: bool,
    int: int,
    float: (int, float),
    str: str,
    list[str]: list,
}
NOT_FOR_STUDIES = ("output_dir", "seed", "disable_tqdm")


@dataclass
class ArmConfig:
    """One arm: a recipe with its options, applied to every language and seed."""

    name: str
    recipe: str
    settings: dict[str, Any]
    arguments: dict[str, Any]
    # "both": the model reads queries and documents; "role": the teacher keeps the other side.
    encodes: str

    def options(self, language: str, teacher: str, config: StudyConfig) -> Any:
        """The recipe's options for one language, or None for an arm without training."""
        kind = RECIPES[self.recipe]
        if kind is None:
            return None
        settings = _fill(self.settings, language)
        if kind is DistillOptions:
            return DistillOptions(**{"teacher": teacher, "role": config.role, **settings})
        taught = config.teacher_options
        shared = (
            {name: getattr(taught, name) for name in ("pairs", "queries", "passages", "scale")}
            if taught
            else {}
        )
        settings["lexicon"] = [
            entry if "=" in entry else f"{language}={entry}"
            for entry in settings.get("lexicon", [])
        ]
        return CodeswitchOptions(**{"model": teacher, "sides": config.role, **shared, **settings})


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
    measures: tuple[str, ...] = DEFAULT_MEASURES
    ceiling: tuple[str, ...] = ("en",)
    alignment: dict[str, str] | None = None
    phrasebook: bool = False
    text: str = ""

    def resource(self, language: str) -> str:
        """Group of a language: "low", "high", or "" where the configuration names none."""
        return "low" if language in self.low else "high" if language in self.high else ""


def read_config(path: str | Path | None, output: str | Path | None = None) -> StudyConfig:
    """Read and check a configuration; None reads the embedded demonstration.

    ``${NAME}`` stands for an environment variable, ``{language}`` for each language in turn. Paths
    that begin with ``./`` or ``../`` are relative to the configuration file, others to the current
    folder, and so is the output folder.

    Raises:
        FileNotFoundError, ValueError: no such file, not YAML, an unknown key (with the nearest
            known one), a missing key, an unset variable, a value of the wrong kind.
    """
    variables = dict(os.environ)
    if path is None:
        source = resources.files("optical") / "data" / "phrasebook" / "study.yaml"
        text, place, folder = source.read_text(encoding="utf-8"), "embedded study", Path()
        output = output or "runs/phrasebook"
        variables["PHRASEBOOK"] = str(Path(output) / "data")
        raw = parse_yaml(text, place)
    else:
        raw, text = read_yaml(path)
        place, folder = str(path), Path(path).parent
    reader = _Reader(place, folder, variables)
    config = reader.study(reader.expand(raw), output)
    config.phrasebook = path is None
    config.text = text
    return config


def read_yaml(path: str | Path) -> tuple[dict[str, Any], str]:
    """Read a YAML file of keys and values; returns them and the file's text."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such configuration file")
    text = "".join(f"{line}\n" for _, line in read_lines(path))
    return parse_yaml(text, str(path)), text


def parse_yaml(text: str, place: str) -> dict[str, Any]:
    """Keys and values of YAML text; `place` names it in errors, which have one line."""
    import yaml

    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = f":{line + 1}" if line is not None else ""
        raise ValueError(f"{place}{where}: not YAML ({str(error).splitlines()[0]})") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{place}: expected keys and values, found {type(raw).__name__}")
    return raw


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
            and entry.name not in ("phrasebook", "text")
        }
        self.known(raw, keys | {"arguments"}, "the study")
        for key in ("languages", "collections", "arms", "teacher"):
            if not raw.get(key):
                raise ValueError(f"{self.place}: no key `{key}`; it is required")
        if not (output or raw.get("output")):
            raise ValueError(f"{self.place}: no key `output`, and no --output given")
        common = self.arguments(raw.get("arguments"), "arguments")
        languages = self.words(raw["languages"], "languages")
        config = StudyConfig(
            title=str(raw.get("title", Path(self.place).stem)),
            output=Path(output or raw["output"]),
            languages=languages,
            collections=self.collections(raw["collections"]),
            arms=[],
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
        )
        for group in ("low", "high"):
            for language in getattr(config, group):
                self.one_of(language, languages, group)
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
            config.encoder = config.encoder or config.teacher_options.model
        else:
            config.teacher = self.located(str(raw["teacher"]))
        arms = self.mapping(raw["arms"], "arms")
        config.arms = [self.arm(str(name), arm, common) for name, arm in arms.items()]
        if len({arm.name.lower() for arm in config.arms}) < len(config.arms):
            raise ValueError(f"{self.place}: arms: two names differ in capitals only")
        if config.alignment is not None:
            self.known(self.mapping(config.alignment, "alignment"), ALIGNMENT_KEYS, "alignment")
            for key in ALIGNMENT_KEYS:
                if key not in config.alignment:
                    raise ValueError(f"{self.place}: alignment: no key `{key}`; it is required")
            self.one_of(config.alignment.get("language"), languages, "alignment.language")
        return config

    def arm(self, name: str, raw: Any, common: dict[str, Any]) -> ArmConfig:
        place = f"arms.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise ValueError(
                f"{self.place}: arms: {name!r}, expected a name of letters, digits, `-` and `_`, "
                "because files are called by it"
            )
        raw = dict(self.mapping(raw or {}, place))
        recipe = self.one_of(raw.pop("recipe", "none"), tuple(RECIPES), f"{place}.recipe")
        kind = RECIPES[recipe]
        # Distillation leaves the other side to the teacher, so an index of it stays valid.
        default = "role" if recipe == "distill" else "both"
        encodes = self.one_of(raw.pop("encodes", default), ("both", "role"), f"{place}.encodes")
        if kind is None:
            self.known(raw, (), place)
            return ArmConfig(name, recipe, {}, {}, encodes)
        own = self.arguments(raw.pop("arguments", None), f"{place}.arguments")
        settings = self.settings(raw, kind, place)
        return ArmConfig(name, recipe, settings, {**common, **own}, encodes)

    def recipe(
        self, raw: dict[str, Any], kind: type[Any], common: dict[str, Any], place: str
    ) -> tuple[Any, dict[str, Any]]:
        raw = dict(raw)
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
        """Check a value against a type; what is no plain type passes."""
        kinds = set(get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,))
        if value is None and NoneType in kinds:
            return value
        kind = next(iter(kinds - {NoneType}))
        if len(kinds - {NoneType}) > 1 or kind not in PLAIN:
            return value
        if kind is float and isinstance(value, str):
            # YAML 1.1 reads 1e-3 as text.
            with contextlib.suppress(ValueError):
                value = float(value)
        fits = isinstance(value, PLAIN[kind]) and (kind is bool or not isinstance(value, bool))
        if fits and kind == list[str]:
            fits = all(isinstance(entry, str) for entry in value)
        if not fits:
            name = getattr(kind, "__name__", "") if isinstance(kind, type) else str(kind)
            raise ValueError(f"{self.place}: {place}: {value!r}, expected {name}")
        return value

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
            self.known(
                self.mapping(parts, f"collections.{name}"), COLLECTION_KEYS, f"collections.{name}"
            )
        return {
            str(name): {key: self.located(str(value)) for key, value in parts.items()}
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


def nearest(key: str, keys: Iterable[str]) -> str:
    """'; did you mean `x`?' for the known key nearest to a mistyped one, or the list of keys."""
    close = difflib.get_close_matches(str(key), list(keys), n=1, cutoff=0.5)
    if close:
        return f"; did you mean `{close[0]}`?"
    listed = sorted(keys)
    return f"; known: {', '.join(listed)}" if 0 < len(listed) < 30 else ""


def _fill(value: Any, language: str) -> Any:
    if isinstance(value, dict):
        return {key: _fill(entry, language) for key, entry in value.items()}
    if isinstance(value, list):
        return [_fill(entry, language) for entry in value]
    return value.replace("{language}", language) if isinstance(value, str) else value
