"""Configuration of a study: one YAML file, every key of which is checked before a task runs."""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from optical.io.settings import nearest, parse_yaml, read_layered, typed
from optical.study.arms import ENCODER, RECIPES, TEACHER, ArmConfig, LexiconConfig
from optical.study.settings import StudyConfig
from optical.training.options import WITHOUT_STEPS, EncoderOptions, Role, TeacherOptions

ROLES = get_args(Role)
COLLECTION_KEYS = (
    "source", "queries", "documents", "qrels", "role", "languages", "pool", "split",
    "query_fields", "ignore_identical_ids",
)  # fmt: skip
TEXTS = ("queries", "documents")
ALIGNMENT_KEYS = ("language", "english", "other")
REQUIRED_KEYS = ("languages", "collections", "arms", "teacher")
# Keys whose values are read by the type of their field in StudyConfig.
PLAIN_KEYS = (
    "languages", "low", "high", "note", "role", "seeds", "measures", "ceiling", "report",
    "store_teacher", "passage_length", "passage_stride", "encode_bf16", "against",
)  # fmt: skip
# Keys with a structure of their own.
STRUCTURED_KEYS = (
    "title", "output", "collections", "names", "encoder", "teacher", "arguments", "arms",
    "lexicons", "translation", "curves", "word_alignment", "alignment",
)  # fmt: skip
# Trainer arguments that the study sets itself.
RESERVED_TRAINER_ARGS = ("output_dir", "seed", "disable_tqdm")


def read_config(path: str | Path | None, output: str | Path | None = None) -> StudyConfig:
    """Read and check a configuration; with None, that of the embedded demonstration.

    ``${NAME}`` in a value is replaced by an environment variable, ``${NAME:-TEXT}`` by TEXT if it
    is not set, and ``{language}`` by each language. A value that is one variable alone may become a
    number or a truth value, as if its text stood there. Paths that begin with ``./`` or ``../`` are
    relative to the configuration file. Other paths, and the output folder, are relative to the
    current folder. ``base`` names another file in the same folder, whose keys are overridden level
    by level.

    Raises:
        FileNotFoundError, ValueError: no such file, invalid YAML, an unknown key (the message
            suggests the nearest known key), a missing key, an unset environment variable, or a
            value of the wrong type.
    """
    variables = dict(os.environ)
    if path is None:
        resource = resources.files("optical") / "phrasebook" / "study.yaml"
        text, source, folder = resource.read_text(encoding="utf-8"), "embedded study", Path()
        output = output or "runs/phrasebook"
        variables["PHRASEBOOK"] = str(Path(output) / "data")
        raw = parse_yaml(text, source)
    else:
        raw, text = read_layered(Path(path))
        source, folder = str(path), Path(path).parent
    reader = _Reader(source, folder, variables)
    config = reader.study(reader.expand(raw), output)
    config.phrasebook = path is None
    config.config_text = text
    return config


# Truth values and numbers, which JSON and YAML write alike.
_SCALAR = re.compile(r"true|false|-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")


@dataclass
class _Reader:
    """Converts parsed YAML into a configuration; `key` arguments name the value in errors."""

    source: str
    folder: Path
    variables: Mapping[str, str]

    def expand(self, value: Any) -> Any:
        """Replace environment variables in every string."""
        if isinstance(value, dict):
            return {key: self.expand(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.expand(entry) for entry in value]
        if isinstance(value, str):
            pattern = r"\$\{(\w+)(?::-([^}]*))?\}"
            filled = re.sub(pattern, lambda match: self.variable(match[1], match[2]), value)
            alone = re.fullmatch(pattern, value) is not None
            return json.loads(filled) if alone and _SCALAR.fullmatch(filled) else filled
        return value

    def variable(self, name: str, default: str | None) -> str:
        if name not in self.variables:
            if default is not None:
                return default
            raise self.error(
                f"the environment variable {name} is not set; set it to the folder of the data, "
                f"`export {name}=...`"
            )
        return self.variables[name]

    def study(self, raw: dict[str, Any], output: str | Path | None) -> StudyConfig:
        self.check_keys(raw, {*PLAIN_KEYS, *STRUCTURED_KEYS}, "the study")
        for key in REQUIRED_KEYS:
            if not raw.get(key):
                raise self.error(f"no key `{key}`; it is required")
        if not (output or raw.get("output")):
            raise self.error("no key `output`, and no --output given")
        common = self.trainer_args(raw.get("arguments"), "arguments")
        hints = get_type_hints(StudyConfig)
        config = StudyConfig(
            title=str(raw.get("title", Path(self.source).stem)),
            output=Path(output or raw["output"]),
            collections=self.collections(raw["collections"]),
            arms=[],
            **{key: self.plain(raw[key], hints[key], key) for key in PLAIN_KEYS if key in raw},
        )
        names = self.mapping(raw.get("names") or {}, "names")
        config.names = {str(language): str(name) for language, name in names.items()}
        for group in ("low", "high"):
            for language in getattr(config, group):
                self.one_of(language, config.languages, group)
        self.collection_languages(config, raw)
        self.lexicons(config, raw)
        self.encoder_and_teacher(config, raw, common)
        arms = self.mapping(raw["arms"], "arms")
        teacher_args = config.teacher_trainer_args or common
        config.arms = [self.arm(str(name), arm, common, teacher_args) for name, arm in arms.items()]
        if len({arm.name.lower() for arm in config.arms}) < len(config.arms):
            raise self.error("arms: two names differ only in case")
        self.arm_references(config, raw)
        self.starts(config)
        self.word_alignment(config, raw)
        self.alignment(config, raw)
        return config

    def plain(self, value: Any, hint: Any, key: str) -> Any:
        """Convert a value to the type of its field."""
        if hint == tuple[str, ...]:
            return self.string_list(value, key)
        if hint == tuple[int, ...]:
            return self.integers(value, key)
        if get_origin(hint) is Literal:
            return self.one_of(value, get_args(hint), key)
        return str(value or "") if hint is str else self.typed(value, hint, key)

    def collections(self, raw: Any) -> dict[str, dict[str, Any]]:
        if not isinstance(raw, dict):
            raise self.error("collections: expected names with their files")
        collections = {}
        for name, parts in raw.items():
            key = f"collections.{name}"
            self.check_keys(self.mapping(parts, key), COLLECTION_KEYS, key)
            if "role" in parts:
                self.one_of(parts["role"], ROLES, f"{key}.role")
            if "split" in parts and "source" not in parts:
                raise self.error(f"{key}.split: selects judgements of a `source`, which is missing")
            own = ("languages", "pool", "query_fields", "ignore_identical_ids")
            files = {k: value for k, value in parts.items() if k not in own}
            collections[str(name)] = {k: self.resolve_model(str(file)) for k, file in files.items()}
            if parts.get("query_fields"):
                fields = self.string_list(parts["query_fields"], f"{key}.query_fields")
                collections[str(name)]["query_fields"] = list(fields)
            ignore = parts.get("ignore_identical_ids", False)
            if self.typed(ignore, bool, f"{key}.ignore_identical_ids"):
                collections[str(name)]["ignore_identical_ids"] = True
        return collections

    def collection_languages(self, config: StudyConfig, raw: dict[str, Any]) -> None:
        for name, parts in raw["collections"].items():
            if "languages" in parts:
                key = f"collections.{name}.languages"
                languages = self.string_list(parts["languages"], key)
                for language in languages:
                    self.one_of(language, (*config.languages, *config.ceiling), key)
                config.collection_languages[str(name)] = languages
            if parts.get("pool"):
                self.pool(config, str(name), parts["pool"])

    def pool(self, config: StudyConfig, name: str, value: Any) -> None:
        key = f"collections.{name}.pool"
        searched = config.languages_of(name)
        own = tuple(language for language in config.languages if language in searched)
        languages = own if value is True else self.string_list(value, key)
        for language in languages:
            self.one_of(language, own, key)
        if len(set(languages)) < 2:
            raise self.error(f"{key}: {value!r}, expected true, or two languages or more")
        if config.role_of(name) != "document":
            raise self.error(f"{key}: the documents of a collection of foreign queries are English")
        config.pools[name] = languages

    def lexicons(self, config: StudyConfig, raw: dict[str, Any]) -> None:
        for name, entry in self.mapping(raw.get("lexicons") or {}, "lexicons").items():
            key = f"lexicons.{name}"
            config.lexicons[str(name)], _ = self.recipe(entry, LexiconConfig, {}, key)

    def encoder_and_teacher(
        self, config: StudyConfig, raw: dict[str, Any], common: dict[str, Any]
    ) -> None:
        if isinstance(raw.get("encoder"), dict):
            config.encoder_options, config.encoder_trainer_args = self.recipe(
                raw["encoder"], EncoderOptions, {}, "encoder"
            )
        else:
            config.encoder = self.resolve_model(str(raw.get("encoder") or ""))
        if isinstance(raw["teacher"], dict):
            if not raw.get("encoder") and "model" not in raw["teacher"]:
                raise self.error("no key `encoder` for the teacher to start from")
            config.teacher_options, config.teacher_trainer_args = self.recipe(
                raw["teacher"], TeacherOptions, common, "teacher"
            )
            if not config.encoder_options:
                config.encoder = config.encoder or config.teacher_options.model
        else:
            config.teacher = self.resolve_model(str(raw["teacher"]))

    def recipe(
        self, raw: Any, options_class: type[Any], common: dict[str, Any], key: str
    ) -> tuple[Any, dict[str, Any]]:
        """Return the options of a recipe and its trainer arguments."""
        raw = dict(self.mapping(raw, key))
        trainer_args = self.trainer_args(raw.pop("arguments", None), f"{key}.arguments")
        return options_class(**self.options(raw, options_class, key)), {**common, **trainer_args}

    def options(self, raw: dict[str, Any], options_class: type[Any], key: str) -> dict[str, Any]:
        hints = get_type_hints(options_class)
        self.check_keys(raw, hints.keys() - {"resume"}, key)
        options = {}
        for name, value in raw.items():
            # A single file may be written without the brackets of a list.
            if hints[name] == list[str] and isinstance(value, str):
                value = [value]
            options[name] = self.resolve_model(self.typed(value, hints[name], f"{key}.{name}"))
        return options

    def trainer_args(self, raw: Any, key: str) -> dict[str, Any]:
        raw = self.mapping(raw or {}, key)
        if not raw:
            return {}
        from sentence_transformers import MultiVectorEncoderTrainingArguments

        hints = get_type_hints(MultiVectorEncoderTrainingArguments)
        fields = {entry.name for entry in dataclasses.fields(MultiVectorEncoderTrainingArguments)}
        self.check_keys(raw, fields - set(RESERVED_TRAINER_ARGS), key)
        return {
            name: self.typed(value, hints[name], f"{key}.{name}") for name, value in raw.items()
        }

    def arm(
        self, name: str, raw: Any, common: dict[str, Any], teacher_args: dict[str, Any]
    ) -> ArmConfig:
        key = f"arms.{name}"
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise self.error(
                f"arms: {name!r}, expected a name of letters, digits, `-` and `_`, because it is "
                "part of file names"
            )
        raw = dict(self.mapping(raw or {}, key))
        recipe = self.one_of(raw.pop("recipe", "none"), tuple(RECIPES), f"{key}.recipe")
        options_class, trains = RECIPES[recipe]
        # The teacher keeps encoding the other texts, so an existing index of them stays valid.
        encodes = "role" if recipe in ("distill", *WITHOUT_STEPS) else "both"
        arm = ArmConfig(
            name,
            recipe,
            options={},
            trainer_args={},
            encodes=self.one_of(raw.pop("encodes", encodes), ("both", "role"), f"{key}.encodes"),
            translate=self.text_files(raw.pop("translate", {}), f"{key}.translate"),
            replace=self.text_files(raw.pop("replace", {}), f"{key}.replace"),
        )
        if "seeds" in raw and (trains or recipe == "ensemble"):
            arm.seeds = self.integers(raw.pop("seeds"), f"{key}.seeds")
        if trains:
            if recipe not in WITHOUT_STEPS:
                own = self.trainer_args(raw.pop("arguments", None), f"{key}.arguments")
                arm.trainer_args = {**(teacher_args if recipe == "teacher" else common), **own}
            # A retriever trained on English only is the same for every language.
            arm.multilingual = self.typed(
                raw.pop("multilingual", recipe == "teacher"), bool, f"{key}.multilingual"
            )
            start = raw.pop("start", [ENCODER] if recipe == "teacher" else [])
            arm.start = self.string_list(
                [start] if isinstance(start, str) else start, f"{key}.start"
            )
            if (len(arm.start) > 1) != (recipe == "average"):
                expected = "two arms or more" if recipe == "average" else "one name at most"
                raise self.error(f"{key}.start: {start!r}, expected {expected}")
        arm.options = self.options(raw, options_class, key)
        if arm.pretrained and not arm.options.get("model"):
            raise self.error(f"{key}: no key `model`; it is required for the recipe {recipe}")
        if recipe == "ensemble" and (arm.translate or arm.replace):
            raise self.error(f"{key}: an ensemble has no texts of its own to translate or replace")
        if recipe == "dense" and arm.encodes == "role":
            raise self.error(f"{key}.encodes: a dense model encodes both sides")
        return arm

    def text_files(self, raw: Any, key: str) -> dict[str, str]:
        self.check_keys(self.mapping(raw, key), TEXTS, key)
        return {str(texts): self.resolve_model(str(value)) for texts, value in raw.items()}

    def arm_references(self, config: StudyConfig, raw: dict[str, Any]) -> None:
        """Check the keys outside of `arms` that name arms."""
        names = [arm.name for arm in config.arms]
        trained = [arm.name for arm in config.arms if arm.trains]
        for name in config.against:
            self.one_of(name, names, "against")
        if raw.get("translation"):
            config.translation = self.one_of(raw["translation"], names, "translation")
        for curve, members in self.mapping(raw.get("curves") or {}, "curves").items():
            config.curves[str(curve)] = self.string_list(members, f"curves.{curve}")
            for name in config.curves[str(curve)]:
                self.one_of(name, trained, f"curves.{curve}")
        for name, lexicon in config.lexicons.items():
            if lexicon.arm:
                self.one_of(lexicon.arm, trained, f"lexicons.{name}.arm")

    def starts(self, config: StudyConfig) -> None:
        """Check that each arm starts from, and takes lexicons from, arms before it."""
        earlier: list[str] = []
        for arm in config.arms:
            for name in arm.start:
                bases = [TEACHER] if arm.recipe == "average" else [TEACHER, ENCODER]
                self.one_of(name, [*bases, *earlier], f"arms.{arm.name}.start")
                if name == ENCODER and not (config.encoder or config.encoder_options):
                    raise self.error(f"no key `encoder` for arms.{arm.name} to start from")
                start = config.arm(name) if name in earlier else arm
                if arm.multilingual and not start.multilingual:
                    raise self.error(
                        f"arms.{arm.name} is multilingual but starts from {name}, which has a "
                        "model for each language"
                    )
            self.members(arm, config)
            for name in arm.induced_lexicons(config):
                source = config.lexicons[name].arm
                if source and source not in earlier:
                    raise self.error(
                        f"arms.{arm.name}: the lexicon {name} is induced from the arm {source}, "
                        "which must come before it"
                    )
            if arm.trains:
                earlier.append(arm.name)

    def members(self, arm: ArmConfig, config: StudyConfig) -> None:
        """Check that an ensemble consists of arms before it that search with token vectors."""
        if arm.recipe != "ensemble":
            return
        key = f"arms.{arm.name}.arms"
        if len(set(arm.members)) < max(len(arm.members), 2):
            raise self.error(f"{key}: {list(arm.members)!r}, expected two different arms or more")
        before = config.arms[: config.arms.index(arm)]
        # Scores of BM25 and of dense models have another scale.
        accepted = [other.name for other in before if other.recipe not in ("bm25", "dense")]
        for name in arm.members:
            self.one_of(name, accepted, key)

    def word_alignment(self, config: StudyConfig, raw: dict[str, Any]) -> None:
        if raw.get(key := "word_alignment") is None:
            return
        settings = dict(self.mapping(raw[key], key))
        self.check_keys(settings, ("bitext", "lexicon", "max_pairs"), key)
        for name in ("bitext", "lexicon"):
            if not isinstance(settings.get(name), str):
                raise self.error(f"{key}: no key `{name}` with a name or file")
            settings[name] = self.resolve_model(settings[name])
        max_pairs = settings.get("max_pairs", 200)
        settings["max_pairs"] = self.typed(max_pairs, int, f"{key}.max_pairs")
        config.word_alignment = settings

    def alignment(self, config: StudyConfig, raw: dict[str, Any]) -> None:
        if raw.get("alignment") is None:
            return
        settings = self.mapping(raw["alignment"], "alignment")
        self.check_keys(settings, (*ALIGNMENT_KEYS, "arm"), "alignment")
        for name in ALIGNMENT_KEYS:
            if name not in settings:
                raise self.error(f"alignment: no key `{name}`; it is required")
        self.one_of(settings["language"], config.languages, "alignment.language")
        if "arm" in settings:
            distilled = [arm.name for arm in config.arms if arm.recipe == "distill"]
            self.one_of(settings["arm"], distilled, "alignment.arm")
        config.alignment = settings

    def resolve_model(self, value: Any) -> Any:
        """Resolve paths that are relative to the configuration file."""
        if isinstance(value, list):
            return [self.resolve_model(entry) for entry in value]
        if not isinstance(value, str):
            return value
        # The path of a lexicon may follow `language=`.
        head, equals, path = value.rpartition("=")
        return head + equals + str(self.folder / path) if path.startswith(("./", "../")) else value

    def error(self, message: str) -> ValueError:
        return ValueError(f"{self.source}: {message}")

    def typed(self, value: Any, hint: Any, key: str) -> Any:
        return typed(value, hint, f"{self.source}: {key}")

    def mapping(self, raw: Any, key: str) -> dict[str, Any]:
        if not isinstance(raw, dict):
            raise self.error(f"{key}: expected keys and values, found {raw!r}")
        return raw

    def check_keys(self, raw: Mapping[str, Any], accepted: Iterable[str], key: str) -> None:
        for name in raw:
            if name not in accepted:
                raise self.error(f"unknown key `{name}` in {key}{nearest(name, accepted)}")

    def one_of(self, value: Any, accepted: Iterable[str], key: str) -> Any:
        if value not in accepted:
            raise self.error(f"{key}: {value!r}, expected {' or '.join(accepted)}")
        return value

    def string_list(self, raw: Any, key: str) -> tuple[str, ...]:
        if isinstance(raw, str) or not isinstance(raw, (list, tuple)):
            raise self.error(f"{key}: {raw!r}, expected a list")
        # YAML 1.1 parses `no`, the code of Norwegian, as False.
        return tuple("no" if entry is False else str(entry) for entry in raw)

    def integers(self, raw: Any, key: str) -> tuple[int, ...]:
        numbers = raw if isinstance(raw, list) else [raw]
        if not numbers or not all(isinstance(number, int) for number in numbers):
            raise self.error(f"{key}: {raw!r}, expected whole numbers")
        return tuple(numbers)
