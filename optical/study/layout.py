"""Files of a study: where each output is stored, and the fingerprints in the file names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from optical.data.collection import Collection, load_collection
from optical.io.files import writable_folder
from optical.io.fingerprints import digest_or_name, fingerprint, with_digests
from optical.phrasebook import corpus
from optical.study.arms import ENCODER, TEACHER, ArmConfig, fill_languages
from optical.study.settings import COLLECTION_FILES, StudyConfig
from optical.training.options import WITHOUT_STEPS, default_of

# Stands for the language in the names of multilingual models.
ALL_LANGUAGES = "all"
FOLDERS = ("models", "lexicons", "vectors", "results", "runs", "figures")
# Folders whose file names contain a fingerprint of the content.
FINGERPRINTED_FOLDERS = ("models", "lexicons", "vectors")
# Options that name models.
MODEL_OPTIONS = ("model", "teacher", "student")
# Trainer arguments that affect checkpoints and logs, but not the trained model.
WITHOUT_EFFECT = ("save_steps", "save_strategy", "save_total_limit", "logging_steps", "report_to")
# Names of renamed options in fingerprints. The old names keep finished tasks of existing studies
# valid.
FINGERPRINT_NAMES = {
    ("CodeswitchOptions", "role"): "sides",
    ("TransferOptions", "initialize_from"): "vectors",
}


class Layout:
    """The output folder of a study: paths and names of everything that its tasks write.

    A name contains a fingerprint of all inputs of its task. A task whose inputs change therefore
    writes another file, and finished tasks are recognised by the existence of their file.
    """

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.output = writable_folder(config.output)
        self.fingerprints = Fingerprints(self.output)
        if config.phrasebook:
            corpus.write(self.output / "data")
        for name in FOLDERS:
            writable_folder(self.output / name)

    def load_collection(self, name: str, language: str) -> Collection:
        """Load a collection with the documents or queries of one language."""
        parts = self.config.collections[name]
        given = {
            part: fill_languages(parts[part], [language])
            for part in (*COLLECTION_FILES, "split")
            if part in parts
        }
        return load_collection(
            given.pop("source", None),
            name=name,
            topic_fields=parts.get("query_fields", ()),
            **given,
        )

    @property
    def encoder_folder(self) -> Path:
        config = self.config
        inputs = [
            self.fingerprints.options(config.encoder_options),
            effective(config.encoder_trainer_args),
            config.seeds[0],
        ]
        return self.output / "models" / f"encoder-{self.fingerprints.of(inputs)}"

    @property
    def encoder_name(self) -> str:
        """Folder or Hugging Face name of the encoder from which models are made."""
        return self.config.encoder or str(self.encoder_folder / "final")

    @property
    def teacher_start(self) -> str:
        """Model from which the teacher is trained: its option `model`, or the study's encoder."""
        options = self.config.teacher_options
        return (options.model if options else "") or self.encoder_name

    @property
    def teacher_folder(self) -> Path:
        config = self.config
        inputs = [
            self.fingerprints.options(config.teacher_options, without="model"),
            effective(config.teacher_trainer_args),
            config.seeds[0],
            self.fingerprints.model(self.teacher_start),
        ]
        return self.output / "models" / f"teacher-{self.fingerprints.of(inputs)}"

    @property
    def teacher_name(self) -> str:
        """Folder or Hugging Face name of the teacher."""
        return self.config.teacher or str(self.teacher_folder / "final")

    def model_name(self, arm: ArmConfig, language: str, seed: int, role: str = "") -> str:
        """Return the folder of an arm's model; for an arm without a model, the teacher."""
        if arm.pretrained:
            return str(fill_languages(arm.options["model"], [language]))
        role = role or self.config.role
        seed = self.effective_seed(arm, seed)
        options = self.options(arm, language, seed, role)
        if options is None:
            return self.teacher_name
        inputs = [
            arm.recipe,
            self.fingerprints.options(options),
            effective(arm.trainer_args),
            seed,
            self.fingerprints.model(self.teacher_name),
        ]
        languages = ALL_LANGUAGES if arm.multilingual else language
        name = f"{file_name(arm.name)}-{languages}-{seed}-{self.fingerprints.of(inputs)}"
        return str(self.output / "models" / name / "final")

    def effective_seed(self, arm: ArmConfig, seed: int) -> int:
        """Return the seed, or the first seed of the study for an arm that is equal for all."""
        return seed if self.depends_on_seed(arm) else self.config.seeds[0]

    def depends_on_seed(self, arm: ArmConfig) -> bool:
        """Whether an arm, a model that it starts from or a member is trained in random steps."""
        names = [*arm.members, *(name for name in arm.start if name not in (TEACHER, ENCODER))]
        if arm.trains and arm.recipe not in WITHOUT_STEPS:
            return True
        return any(self.depends_on_seed(self.config.arm(name)) for name in names)

    def options(self, arm: ArmConfig, language: str, seed: int, role: str) -> Any:
        """Return the options of an arm with the paths of its models and lexicons."""
        start = []
        for name in arm.start:
            if name == ENCODER:
                start.append(self.encoder_name)
            elif name == TEACHER:
                # Other recipes start from the teacher if they are given no model.
                start += [self.teacher_name] if arm.recipe == "average" else []
            else:
                start.append(self.model_name(self.config.arm(name), language, seed, role))
        return arm.resolve_options(
            self.training_languages(arm, language),
            self.teacher_name,
            self.config,
            role=role,
            start=start,
            lexicon_path=lambda name, language: self.lexicon_path(name, language, role),
        )

    def training_languages(self, arm: ArmConfig, language: str) -> list[str]:
        return list(self.config.languages) if arm.multilingual else [language]

    def lexicon_path(self, name: str, language: str, role: str) -> str:
        """Return the path of a lexicon, which the study induces or which is an existing file."""
        config = self.config
        if name not in config.lexicons:
            return str(fill_languages(name, [language]))
        lexicon = config.lexicons[name]
        model = ""
        if lexicon.arm:
            arm = config.arm(lexicon.arm)
            model = self.fingerprints.model(self.model_name(arm, language, config.seeds[0], role))
            model += role + self.fingerprints.model(self.teacher_name)
        options = vars(lexicon) | {"bitext": fill_languages(lexicon.bitext, [language])}
        fingerprint = self.fingerprints.of([self.fingerprints.files(options), model])
        return str(self.output / "lexicons" / f"{file_name(name)}-{language}-{fingerprint}.tsv")

    def evaluation_inputs(
        self, arm: ArmConfig, model: str, language: str, role: str, collections: list[str]
    ) -> Any:
        """Return all inputs of an evaluation task, for its fingerprint."""
        config = self.config
        lexicons = {
            texts: self.lexicon_path(name, language, role) for texts, name in arm.translate.items()
        }
        replaced = {
            texts: [
                fill_languages(path, [language]).replace("{collection}", name)
                for name in collections
            ]
            for texts, path in arm.replace.items()
        }
        inputs: list[Any] = [
            self.collection_inputs(collections, language),
            list(config.measures),
            role,
            self.fingerprints.files([lexicons, replaced]),
        ]
        if arm.recipe == "bm25":
            return [*inputs, arm.recipe, arm.options]
        if arm.pretrained:
            inputs += [arm.recipe, {**arm.options, "model": ""}]
        models = [self.fingerprints.model(model), self.fingerprints.model(self.teacher_name)]
        inputs += [models, arm.encodes, config.passage_length, config.passage_stride]
        return [*inputs, "bfloat16"] if config.encode_bf16 else inputs

    def collection_inputs(self, collections: list[str], language: str) -> Any:
        """Return the content hashes of the files of collections."""
        inputs = {}
        for name in collections:
            parts = {
                part: fill_languages(value, [language])
                for part, value in self.config.collections[name].items()
            }
            if "source" in parts:
                parts["source"] = self.fingerprints.model(parts["source"])
            inputs[name] = self.fingerprints.files(parts)
        return inputs

    def searched_collections(self, language: str, role: str) -> list[str]:
        """Return the collections that students of a role search in a language."""
        config = self.config
        return [
            name
            for name in config.collections
            if config.role_of(name) == role and language in config.languages_of(name)
        ]

    def count_pairs(self, arm: ArmConfig, language: str) -> int | None:
        """Return the number of sentence pairs of a language that an arm is trained on."""
        from optical.data.pairs import read_bitext_pairs

        files = fill_languages(arm.options.get("bitext", []), [language])
        limit = arm.options.get("max_pairs")
        return sum(len(read_bitext_pairs(path)[:limit]) for path in files) if files else None

    def role_suffix(self, role: str) -> str:
        """Return the end of a task label, which names the role if the study has both."""
        return f" {role}" if len(self.config.roles) > 1 else ""


def file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "_" for c in text.lower())


def effective(trainer_args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trainer arguments that affect the trained model."""
    return {name: value for name, value in trainer_args.items() if name not in WITHOUT_EFFECT}


class Fingerprints:
    """Content hashes of the inputs of a study's tasks. The output folder may be moved."""

    def __init__(self, output: Path) -> None:
        self.output = output

    def of(self, inputs: Any) -> str:
        """Return the fingerprint of plain data, ten hexadecimal digits."""
        return fingerprint(inputs)

    def options(self, options: Any, without: str = "") -> Any:
        """Return options as plain data in which files and models are replaced by their hashes.

        Options with their default value are left out, so that an option added by a later version
        does not invalidate finished tasks.
        """
        if options is None:
            return None
        # Resuming and stored teacher vectors do not affect the trained model.
        left_out = ("resume", "teacher_vectors", without)
        inputs = {}
        for entry in dataclasses.fields(options):
            value = getattr(options, entry.name)
            if entry.name in left_out or value == default_of(entry):
                continue
            name = FINGERPRINT_NAMES.get((type(options).__name__, entry.name), entry.name)
            inputs[name] = (self.model if entry.name in MODEL_OPTIONS else self.files)(value)
        return inputs

    def files(self, value: Any) -> Any:
        """Return `value` with every file name in it replaced by the hash of the file's content.

        A string may be `file`, `language=file`, or two aligned files `corpus.en,corpus.sw`.
        """
        return with_digests(value, self._file)

    def model(self, name: str) -> str:
        """Return an identity of a model or collection.

        A model of the study is identified by its fingerprinted name, a folder from elsewhere by
        the names, sizes and times of its files, and anything else by its name.
        """
        study_name = self._study_name(name)
        if study_name:
            return study_name
        path = Path(name)
        return self._folder(path) if name and path.is_dir() else name

    def _file(self, value: str) -> str:
        """Return the SHA-256 of the file `value`, or `value` if there is no such file."""
        study_name = self._study_name(value)
        if study_name:
            # The file may not exist yet; its name contains the fingerprint of its content.
            return study_name
        return digest_or_name(value)

    def _study_name(self, value: str) -> str:
        """Return the fingerprinted name of a file of the study, or "" for other files."""
        try:
            kind, name, *_ = Path(value).relative_to(self.output).parts
        except ValueError:
            return ""
        return name if kind in FINGERPRINTED_FOLDERS else ""

    def _folder(self, folder: Path) -> str:
        # Weights are too large to hash their content.
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        stats = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
        return self.of([(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats])
