"""Where a study keeps what it makes: every name carries a fingerprint of all it depends on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optical.data.collection import Collection, load_collection
from optical.io.files import writable_folder
from optical.phrasebook import corpus
from optical.study.arms import ENCODER, TEACHER, ArmConfig, filled, pairs_read
from optical.study.config import StudyConfig
from optical.training.options import AT_ONCE

# Models of all languages are called so.
ALL = "all"


class Places:
    """A configuration bound to its output folder."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.output = writable_folder(config.output)
        self.prints = Fingerprints(self.output)
        if config.phrasebook:
            corpus.write(self.output / "data")
        for name in ("models", "lexicons", "vectors", "results", "runs", "figures"):
            writable_folder(self.output / name)

    def collection(self, name: str, language: str) -> Collection:
        """Load one collection with the documents (or queries) of one language."""
        parts = self.config.collections[name]
        texts = {key: filled(value, [language]) for key, value in parts.items() if key != "role"}
        return load_collection(texts.pop("source", None), name=name, **texts)

    @property
    def encoder_folder(self) -> Path:
        config = self.config
        parts = [
            self.prints.options(config.encoder_options),
            effective(config.encoder_arguments),
            config.seeds[0],
        ]
        return self.output / "models" / f"encoder-{self.prints.of(parts)}"

    @property
    def encoder_name(self) -> str:
        """Folder or Hugging Face name of the encoder that models are made of."""
        return self.config.encoder or str(self.encoder_folder / "final")

    @property
    def teacher_start(self) -> str:
        """What the teacher is trained from: its own `model`, or the study's encoder."""
        taught = self.config.teacher_options
        return (taught.model if taught else "") or self.encoder_name

    @property
    def teacher_folder(self) -> Path:
        config = self.config
        parts = [
            self.prints.options(config.teacher_options, without="model"),
            effective(config.teacher_arguments),
            config.seeds[0],
            self.prints.model(self.teacher_start),
        ]
        return self.output / "models" / f"teacher-{self.prints.of(parts)}"

    @property
    def teacher_name(self) -> str:
        return self.config.teacher or str(self.teacher_folder / "final")

    def student_name(self, arm: ArmConfig, language: str, seed: int, role: str = "") -> str:
        """Folder of an arm's trained model; the teacher itself for an arm without training."""
        role = role or self.config.role
        seed = self.seed_of(arm, seed)
        options = self.options(arm, language, seed, role)
        if options is None:
            return self.teacher_name
        parts = [
            arm.recipe,
            self.prints.options(options),
            effective(arm.arguments),
            seed,
            self.prints.model(self.teacher_name),
        ]
        where = ALL if arm.multilingual else language
        name = f"{file_name(arm.name)}-{where}-{seed}-{self.prints.of(parts)}"
        return str(self.output / "models" / name / "final")

    def seed_of(self, arm: ArmConfig, seed: int) -> int:
        """The seed, or the study's first for an arm that is the same for every seed."""
        return seed if self.seeded(arm) else self.config.seeds[0]

    def seeded(self, arm: ArmConfig) -> bool:
        """Whether seeds matter: not without training, nor to what is made at once without any."""
        starts = [self.config.arm(name) for name in arm.start if name not in (TEACHER, ENCODER)]
        return arm.trains and (arm.recipe not in AT_ONCE or any(map(self.seeded, starts)))

    def options(self, arm: ArmConfig, language: str, seed: int, role: str) -> Any:
        """An arm's options with every model and word table in its place."""
        start = []
        for name in arm.start:
            if name == ENCODER:
                start.append(self.encoder_name)
            elif name != TEACHER:
                start.append(self.student_name(self.config.arm(name), language, seed, role))
        return arm.options(
            self.languages(arm, language),
            self.teacher_name,
            self.config,
            role=role,
            start=start,
            lexicon=lambda name, one: self.table(name, one, role),
        )

    def languages(self, arm: ArmConfig, language: str) -> list[str]:
        return list(self.config.languages) if arm.multilingual else [language]

    def table(self, name: str, language: str, role: str) -> str:
        """Path of a word table: one that the study makes, or a file."""
        config = self.config
        if name not in config.lexicons:
            return str(filled(name, [language]))
        made = config.lexicons[name]
        model = ""
        if made.arm:
            arm = config.arm(made.arm)
            model = self.prints.model(self.student_name(arm, language, config.seeds[0], role))
            model += role + self.prints.model(self.teacher_name)
        options = vars(made) | {"bitext": filled(made.bitext, [language])}
        parts = self.prints.of([self.prints.files(options), model])
        return str(self.output / "lexicons" / f"{file_name(name)}-{language}-{parts}.tsv")

    def evaluation_parts(
        self, arm: ArmConfig, model: str, language: str, role: str, names: list[str]
    ) -> Any:
        config = self.config
        tables = {side: self.table(table, language, role) for side, table in arm.translate.items()}
        replaced = {
            side: [filled(path, [language]).replace("{collection}", name) for name in names]
            for side, path in arm.replace.items()
        }
        parts: list[Any] = [
            self.files(names, language),
            list(config.measures),
            role,
            self.prints.files([tables, replaced]),
        ]
        if arm.recipe == "bm25":
            return [*parts, arm.recipe, arm.settings]
        models = [self.prints.model(model), self.prints.model(self.teacher_name)]
        return [*parts, models, arm.encodes, config.passage_length, config.passage_stride]

    def searched(self, language: str, role: str) -> list[str]:
        """The collections that students of a role search in a language."""
        config = self.config
        return [
            name
            for name in config.collections
            if config.role_of(name) == role and language in config.languages_of(name)
        ]

    def files(self, names: list[str], language: str) -> Any:
        """What is in the files of collections."""
        return {
            name: self.prints.files(
                {
                    part: self.prints.model(value) if part == "source" else value
                    for part, value in (
                        (part, filled(value, [language]))
                        for part, value in self.config.collections[name].items()
                    )
                }
            )
            for name in names
        }

    def pairs(self, arm: ArmConfig, language: str) -> int | None:
        """How many sentence pairs of a language an arm learns from."""
        from optical.data.pairs import read_bitext_pairs

        read = pairs_read(arm, language)
        counts = [len(read_bitext_pairs(path)[: read["max_pairs"]]) for path in read["bitext"]]
        return sum(counts) if counts else None

    def of_role(self, role: str) -> str:
        """The end of a label, where a study has cells of both roles."""
        return f" {role}" if len(self.config.roles) > 1 else ""


def file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "_" for c in text.lower())


# Arguments of the trainer that change what is kept and said, never what is learnt.
WITHOUT_EFFECT = ("save_steps", "save_strategy", "save_total_limit", "logging_steps", "report_to")
# Folders of a study in which names carry the fingerprint of what they hold.
MADE = ("models", "lexicons", "vectors")
MODELS = ("model", "teacher", "student")


class Fingerprints:
    """Fingerprints for a study with its output in one folder, which may be moved."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def of(self, parts: Any) -> str:
        """Ten digits that stand for plain data."""
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]

    def options(self, options: Any, without: str = "") -> Any:
        """Options as plain data, every file and model replaced by what is in it."""
        if options is None:
            return None
        # How a training is fed and whether it is resumed changes nothing of what it learns.
        left_out = ("resume", "teacher_vectors", without)
        return {
            field.name: (self.model if field.name in MODELS else self.files)(value)
            for field in dataclasses.fields(options)
            # Without defaults, an option that a later version adds leaves alone what is finished.
            if (value := getattr(options, field.name)) != _default(field)
            and field.name not in left_out
        }

    def files(self, value: Any) -> Any:
        """`value` with every file in it replaced by a digest of its contents."""
        if isinstance(value, Mapping):
            return {key: self.files(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.files(entry) for entry in value]
        if not isinstance(value, str):
            return value
        # `file`, `language=file`, or two aligned files `corpus.en,corpus.sw`.
        whole = self._named(value)
        return whole if whole != value else ",".join(map(self._named, value.split(",")))

    def model(self, name: str) -> str:
        """A model of the study by its fingerprinted name, so that the output folder can be moved;
        a model from elsewhere by what is in its folder."""
        made = self._made(name)
        if made:
            return made
        path = Path(name)
        return self._folder(path) if name and path.is_dir() else name

    def _named(self, value: str) -> str:
        whole = self._file(value)
        name, equals, path = value.partition("=")
        return whole if whole != value or not equals else f"{name}={self._file(path)}"

    def _file(self, value: str) -> str:
        """SHA-256 of the file that `value` names, or `value` itself where it names none."""
        made = self._made(value)
        if made:
            # What the study makes itself may not be there yet; its name says what it will be.
            return made
        try:
            stat = os.stat(value)
            return _digest(value, stat.st_size, stat.st_mtime_ns)
        except OSError:
            return value

    def _made(self, value: str) -> str:
        """Name of what the study made, or "" for what comes from elsewhere."""
        try:
            kind, name, *_ = Path(value).relative_to(self.output).parts
        except ValueError:
            return ""
        return name if kind in MADE else ""

    def _folder(self, folder: Path) -> str:
        """Names, sizes and times of a model or collection from elsewhere; weights are too large."""
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        found = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
        return self.of([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found])


def effective(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The trainer's arguments that change what is learnt."""
    return {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT}


@functools.lru_cache(maxsize=1000)
def _digest(path: str, size: int, time_ns: int) -> str:
    # Size and time are in the key alone: a changed file is read again.
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _default(field: dataclasses.Field[Any]) -> Any:
    made = field.default_factory
    return field.default if made is dataclasses.MISSING else made()
