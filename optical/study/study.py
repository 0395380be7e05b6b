"""Run a study: train every arm, search, evaluate and compare, from one configuration file.

A study is a list of tasks. Each task writes one output below the output folder:

    models/encoder-<fingerprint>     tokenizer and encoder, if the configuration trains one
    models/teacher-<fingerprint>     the English retriever
    vectors/<bitext>-<fingerprint>   token vectors of the teacher, if they are stored
    lexicons/<name>-<language>-<fingerprint>.tsv         a lexicon induced from bitext
    models/<arm>-<language>-<seed>-<fingerprint>         a trained student
    results/<arm>-<language>-<seed>-<fingerprint>.json   its measures per query (and runs/*.run.gz)

The fingerprint hashes everything that the task depends on: its options, the contents of its input
files and the fingerprints of the tasks before it. A study that was interrupted, or whose
configuration was extended, therefore continues where it stopped. Finished tasks are not repeated,
and outputs of changed tasks are not reused. The report is computed from study.json, written before
the first task, and from the results; ``optical report`` writes it from those that exist.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from optical.io.environment import environment, require
from optical.io.files import disk_full_errors, folder_lock, writable_folder
from optical.report.stored import report_folder, write_study
from optical.study.arms import ENCODER, TEACHER, ArmConfig, fill_languages
from optical.study.config import read_config
from optical.study.evaluation_tasks import EvaluationTasks
from optical.study.inputs import identify_inputs
from optical.study.layout import Layout
from optical.study.settings import StudyConfig
from optical.study.tasks import Task, duration, run_tasks
from optical.study.training_tasks import TrainingTasks

logger = logging.getLogger("optical")


def run_study(config: str | Path | None, output: str | Path | None = None) -> Path:
    """Run a study and write its report; finished tasks of earlier runs are not repeated.

    Args:
        config: YAML file, whose keys are documented in docs/study.md. None runs the embedded
            demonstration on the phrasebook.
        output: output folder (None: ``output`` of the configuration).

    Returns:
        The path of ``report.md``; ``report.html``, ``results.csv`` and ``figures/`` are in the same
        folder.

    Raises:
        ValueError, FileNotFoundError, OSError: the configuration or an input file is invalid, the
            output folder cannot be written, or another process works in it. These errors are found
            before any training starts.
        ImportError: a package of the extra ``study`` is missing.
    """
    for module in ("yaml", "ir_measures", "matplotlib"):
        require(module, "study", "a study")
    study = Study(read_config(config, output))
    with folder_lock(study.layout.output), disk_full_errors(study.layout.output):
        study.check()
        return study.run()


class Study:
    """A study that can run: its input checks, its tasks in order, and its report."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.layout = Layout(config)
        self.training = TrainingTasks(self.layout)
        self.evaluation = EvaluationTasks(self.layout)
        # Collection -> language -> its numbers of queries and documents; set by `check`.
        self.sizes: dict[str, dict[str, dict[str, float]]] = {}

    def run(self) -> Path:
        """Run the unfinished tasks and write the report; return the path of report.md."""
        tasks = self.tasks()
        start = time.monotonic()
        folder = self.describe(tasks)
        logger.info("`optical report %s` reports what is finished, at any time", folder)
        run_tasks(self.config.title, tasks, self.layout.output)
        report = report_folder(folder)
        logger.info("%s written in %s", report, duration(time.monotonic() - start))
        return report

    def tasks(self) -> list[Task]:
        """Return all tasks in execution order, including finished ones."""
        every = [
            *self.training.base_models(),
            *self.evaluation.ceiling(),
            *(task for run in self._runs() for task in self._arm_tasks(*run)),
            *(task for run in self._pooled_runs() for task in self.evaluation.pool(*run)),
            *self.evaluation.tokens(),
            *self.evaluation.alignment(),
        ]
        # A task that several arms need is kept where it is needed first.
        by_output: dict[Path, Task] = {}
        for task in every:
            by_output.setdefault(task.output, task)
        return list(by_output.values())

    def _runs(self) -> Iterator[tuple[ArmConfig, str, int, str]]:
        """Yield every (arm, language, seed, role) that is evaluated."""
        config = self.config
        seeds = sorted({*config.seeds, *(seed for arm in config.arms for seed in arm.seeds)})
        for seed in seeds:
            for arm in config.arms:
                arm_seeds = arm.seeds or config.seeds
                if seed not in (
                    arm_seeds if self.layout.depends_on_seed(arm) else config.seeds[:1]
                ):
                    continue
                for language in config.languages:
                    for role in config.roles:
                        if self.layout.searched_collections(language, role):
                            yield arm, language, seed, role

    def _pooled_runs(self) -> list[tuple[ArmConfig, int]]:
        """Return every (arm, seed) that searches foreign documents."""
        found = {(arm.name, seed): arm for arm, _, seed, role in self._runs() if role == "document"}
        return [(arm, seed) for (_, seed), arm in found.items()]

    def _arm_tasks(self, arm: ArmConfig, language: str, seed: int, role: str) -> Iterator[Task]:
        for member in map(self.config.arm, arm.members):
            member_seed = self.layout.effective_seed(member, seed)
            yield from self._arm_tasks(member, language, member_seed, role)
        yield from self.training.model(arm, language, seed, role)
        for lexicon in arm.translate.values():
            yield from self.training.lexicon(lexicon, language, role)
        yield self.evaluation.evaluation(arm, language, seed, role)
        word_alignment = self.config.word_alignment
        if word_alignment and arm.has_vectors:
            yield from self.training.lexicon(word_alignment["lexicon"], language, role)
            yield self.evaluation.word_alignment(arm, language, seed, role)

    def describe(self, tasks: list[Task]) -> Path:
        """Write study.json, from which the report is computed; return its folder."""
        folder = writable_folder(self.layout.output / self.config.report)
        described = dataclasses.replace(
            self.config.describe(),
            starts=self._starts(),
            trained_pairs=self._trained_alignment_pairs(),
            sizes=self.sizes,
            inputs=identify_inputs(self.config),
            environment=environment(),
        )
        listed = [(task.label, task.output) for task in tasks]
        write_study(described, listed, folder, self.layout.output)
        return folder

    def _starts(self) -> dict[str, tuple[str, ...]]:
        """Return the arms that each trained arm starts from.

        The first arm without training stands for the teacher; the encoder has no arm.
        """
        arms = self.config.arms
        unchanged = [
            arm.name
            for arm in arms
            if arm.recipe == "none" and not arm.translate and not arm.replace
        ]
        starts = {}
        for arm in arms:
            # An arm with a model of its own starts from no arm.
            own = "model" in arm.options or "student" in arm.options
            names = arm.start or ((TEACHER,) if arm.trains and not own else ())
            known = [*(unchanged[:1] if TEACHER in names else ())]
            known += [name for name in names if name not in (TEACHER, ENCODER)]
            if known:
                starts[arm.name] = tuple(known)
        return starts

    def _trained_alignment_pairs(self) -> dict[str, tuple[int, int]]:
        """Return language -> aligned sentence pairs that a model was trained on, and their number.

        A pair counts if it is in the bitext of any arm, lexicon or encoder of the study.
        """
        from optical.data.pairs import read_bitext_pairs

        config, settings = self.config, self.config.word_alignment
        if not settings:
            return {}
        aligned = {
            language: read_bitext_pairs(fill_languages(settings["bitext"], [language]))[
                : settings["max_pairs"]
            ]
            for language in config.languages
        }
        files = [(path, None) for path in getattr(config.encoder_options, "bitext", ())]
        for source in (*(arm.options for arm in config.arms), *map(vars, config.lexicons.values())):
            paths = fill_languages(list(source.get("bitext", ())), config.languages)
            files += [(path, source.get("max_pairs")) for path in paths]
        wanted = {pair for pairs in aligned.values() for pair in pairs}
        trained: set[tuple[str, str]] = set()
        for path, limit in dict.fromkeys(files):
            trained |= wanted.intersection(read_bitext_pairs(path)[:limit])
        return {
            language: (sum(pair in trained for pair in pairs), len(pairs))
            for language, pairs in aligned.items()
        }

    def check(self) -> None:
        """Read every input once, so that errors are found before any training."""
        from optical.data.pairs import read_bitext_pairs
        from optical.retrieval.evaluation import evaluate

        config = self.config
        # Evaluating one query and one document shows whether every measure can be computed.
        evaluate({"q": {"d": 1.0}}, {"q": {"d": 1}}, config.measures)
        self._check_base_models()
        for name, lexicon in config.lexicons.items():
            for path in fill_languages(lexicon.bitext, config.languages) or [""]:
                try:
                    read_bitext_pairs(path)
                except (OSError, ValueError) as error:
                    raise ValueError(f"lexicons.{name}: {error}") from None
        for arm in config.arms:
            for language in config.languages:
                try:
                    self._check_arm(arm, language)
                except (OSError, ValueError) as error:
                    raise ValueError(
                        f"arm {arm.name}, language {language}: {error}; correct the file, or "
                        "remove the arm or the language from the study"
                    ) from None
        if config.word_alignment:
            for path in fill_languages([config.word_alignment["bitext"]], config.languages):
                read_bitext_pairs(path)
        for name in config.collections:
            for language in config.languages_of(name):
                collection = self.layout.load_collection(name, language)
                relevant = sum(
                    grade > 0 for grades in collection.qrels.values() for grade in grades.values()
                )
                self.sizes.setdefault(name, {})[language] = {
                    "queries": len(collection.queries),
                    "documents": len(collection.documents),
                    "relevant": relevant / len(collection.queries),
                }

    def _check_base_models(self) -> None:
        from optical.data.pairs import read_bitext_pairs, read_training_pairs
        from optical.data.texts import read_sentences
        from optical.training.recipes import trainer_arguments

        config = self.config
        for name in (config.encoder, config.teacher):
            if name:
                _check_model(name)
        if config.encoder_options:
            config.encoder_options.validate()
            for path in config.encoder_options.text:
                read_sentences(path)
            for path in config.encoder_options.bitext:
                read_bitext_pairs(path)
        if config.teacher_options:
            teacher = config.teacher_options
            dataclasses.replace(teacher, model=self.layout.teacher_start).validate()
            if teacher.model:
                _check_model(teacher.model)
            trainer_arguments(self.layout.output, **config.teacher_trainer_args)
            read_training_pairs(teacher.pairs, teacher.queries, teacher.passages)

    def _check_arm(self, arm: ArmConfig, language: str) -> None:
        from optical.data.lexicon import read_lexicon
        from optical.data.pairs import read_bitext_pairs
        from optical.data.texts import read_sentences, read_texts
        from optical.training.recipes import trainer_arguments

        config = self.config
        if arm.recipe == "bm25":
            require("bm25s", "eval", "the recipe bm25")
        for texts, lexicon in arm.translate.items():
            if lexicon not in config.lexicons:
                read_lexicon(fill_languages(lexicon, [language]))
            if texts in arm.replace:
                raise ValueError(f"{texts}: both translated and replaced; expected one of them")
        for path in arm.replace.values():
            for name in config.collections:
                if language in config.languages_of(name):
                    read_texts(fill_languages(path, [language]).replace("{collection}", name))
        if arm.pretrained:
            _check_pretrained(arm, fill_languages(arm.options["model"], [language]))
        options = arm.resolve_options(language, "teacher", config, start=arm.start)
        if options is None:
            return
        options.validate()
        trainer_arguments(self.layout.output, **arm.trainer_args)
        if "student" in arm.options:
            _check_model(options.student)
        for path in getattr(options, "bitext", []):
            read_bitext_pairs(path)
        for path in getattr(options, "text", []):
            read_sentences(path)
        for entry in getattr(options, "lexicon", []):
            path = entry.split("=", 1)[1]
            if path not in config.lexicons:
                read_lexicon(path)


def _check_model(name: str) -> None:
    """Raise ValueError for a model that is neither here nor on the hub, before anything is made."""
    from optical.models.retriever import check_model, configuration_files, resolve_model

    check_model(name)
    folder = resolve_model(name)
    if not Path(folder).is_dir():
        logger.info("looking for the model %s on the hub", name)
    configuration_files(folder)


def _check_pretrained(arm: ArmConfig, name: str) -> None:
    """Raise ValueError if a model is missing, or of the other kind than the recipe's."""
    from optical.models.retriever import is_multi_vector, resolve_model

    _check_model(name)
    if is_multi_vector(resolve_model(name)) != (arm.recipe == "multivector"):
        kind, recipe = (
            ("one vector", "dense")
            if arm.recipe == "multivector"
            else ("token vectors", "multivector")
        )
        raise ValueError(f"model {name}: has {kind} for each text; use the recipe `{recipe}`")
