"""Where a study keeps what it makes: every name carries a fingerprint of all it depends on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from optical import phrasebook
from optical.arms import ENCODER, TEACHER, ArmConfig, filled, pairs_read
from optical.collections import Collection, load_collection
from optical.config import StudyConfig
from optical.files import writable_folder
from optical.fingerprints import Fingerprints, effective
from optical.options import AT_ONCE

# Models of all languages are called so.
ALL = "all"


class Places:
    """A configuration bound to its output folder."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.output = writable_folder(config.output)
        self.prints = Fingerprints(self.output)
        if config.phrasebook:
            phrasebook.write(self.output / "data")
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
        from optical.bitext import read_pairs

        read = pairs_read(arm, language)
        counts = [len(read_pairs(path)[: read["max_pairs"]]) for path in read["bitext"]]
        return sum(counts) if counts else None

    def of_role(self, role: str) -> str:
        """The end of a label, where a study has cells of both roles."""
        return f" {role}" if len(self.config.roles) > 1 else ""


def file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "_" for c in text.lower())
