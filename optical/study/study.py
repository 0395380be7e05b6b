"""The main job: train every arm, search, evaluate, and compare, from one configuration file.

A study is a list of cells, each in a folder of its own under the output folder:

    models/encoder-<print>      tokenizer and encoder, where the configuration trains one
    models/teacher-<print>      the English retriever
    vectors/<bitext>-<print>    the teacher's vectors of a bitext, where they are stored
    lexicons/<name>-<language>-<print>.tsv   a word table made of bitext
    models/<arm>-<language>-<seed>-<print>   one trained student
    results/<arm>-<language>-<seed>-<print>.json   its measures, query by query (and runs/*.run.gz)

<print> is a fingerprint of everything the cell depends on: its options, the contents of its input
files and the fingerprints of the cells before it. So a study that was interrupted, or whose
configuration grew, continues where it stopped; what is finished is never run again, and what
changed is never mistaken for what is there. The report is made from the results alone.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optical.io.files import disk_full_errors, folder_lock, read_json, writable_folder
from optical.study.arms import ENCODER, TEACHER, ArmConfig, filled
from optical.study.config import read_config
from optical.study.evaluation_tasks import Measuring
from optical.study.layout import ALL, file_name
from optical.study.tasks import CEILING, Cell, Costs, duration, run_cells
from optical.study.training_tasks import training_cell

logger = logging.getLogger("optical")


def run_study(config: str | Path | None, output: str | Path | None = None) -> Path:
    """Run a study to its report, continuing what an earlier run of it finished.

    Args:
        config: YAML file (the keys are documented in docs/study.md and ``optical.study.config``); None
            runs the embedded demonstration on the phrasebook.
        output: folder for everything that is written; None takes the configuration's ``output``.

    Returns:
        The path of ``report.md``; ``report.html``, ``results.csv`` and ``figures/`` are beside it.

    Raises:
        ValueError, FileNotFoundError, OSError: the configuration or a file it names is wrong, or
            the output folder cannot be written or another process works in it; found before any
            training starts.
    """
    study = Study(read_config(config, output))
    with folder_lock(study.output), disk_full_errors(study.output):
        study.check()
        return study.run()


class Study(Measuring):
    """A configuration that runs: its checks, its cells in order, and its report."""

    def check(self) -> None:
        """Read every input once, so that what is wrong shows before any training."""
        from optical.data.pairs import read_bitext_pairs, read_training_pairs
        from optical.data.texts import read_sentences
        from optical.models.retriever import check_model
        from optical.retrieval.evaluation import evaluate
        from optical.training.recipes import arguments

        config = self.config
        # One query and one document tell whether every measure can be calculated.
        evaluate({"q": {"d": 1.0}}, {"q": {"d": 1}}, config.measures)
        for name in (config.encoder, config.teacher):
            if name:
                check_model(name)
        if config.encoder_options:
            config.encoder_options.validate()
            for path in config.encoder_options.text:
                read_sentences(path)
            for path in config.encoder_options.bitext:
                read_bitext_pairs(path)
        if config.teacher_options:
            taught = config.teacher_options
            dataclasses.replace(taught, model=self.teacher_start).validate()
            if taught.model:
                check_model(taught.model)
            arguments(self.output, **config.teacher_arguments)
            read_training_pairs(taught.pairs, taught.queries, taught.passages)
        for name, made in config.lexicons.items():
            for path in filled(made.bitext, config.languages) or [""]:
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
                        f"arm {arm.name}, language {language}: {error}; "
                        "mend the file, or leave the arm or the language out"
                    ) from None
        if config.word_alignment:
            for path in filled([config.word_alignment["bitext"]], config.languages):
                read_bitext_pairs(path)
        for name in config.collections:
            for language in config.languages_of(name):
                self.collection(name, language)

    def _check_arm(self, arm: ArmConfig, language: str) -> None:
        from optical.data.lexicon import read_lexicon
        from optical.data.pairs import read_bitext_pairs
        from optical.data.texts import read_sentences, read_texts
        from optical.models.retriever import check_model
        from optical.training.recipes import arguments

        for side, table in arm.translate.items():
            if table not in self.config.lexicons:
                read_lexicon(filled(table, [language]))
            if side in arm.replace:
                raise ValueError(f"{side}: both translated and replaced; expected one of them")
        for path in arm.replace.values():
            for name in self.config.collections:
                if language not in self.config.languages_of(name):
                    continue
                read_texts(filled(path, [language]).replace("{collection}", name))
        options = arm.options(language, "teacher", self.config, start=arm.start)
        if options is None:
            return
        options.validate()
        arguments(self.output, **arm.arguments)
        if "student" in arm.settings:
            check_model(options.student)
        for path in getattr(options, "bitext", []):
            read_bitext_pairs(path)
        for path in getattr(options, "text", []):
            read_sentences(path)
        for entry in getattr(options, "lexicon", []):
            path = entry.split("=", 1)[1]
            if path not in self.config.lexicons:
                read_lexicon(path)

    # The cells, in the order in which they run.

    def cells(self) -> list[Cell]:
        every = [
            *self._base_cells(),
            *(cell for job in self._jobs() for cell in self._job_cells(*job)),
            *self._token_cells(),
            *self.alignment_cells(),
        ]
        # What several arms need stands once, where it is needed first.
        first: dict[Path, Cell] = {}
        for cell in every:
            first.setdefault(cell.mark, cell)
        return list(first.values())

    def _base_cells(self) -> Iterator[Cell]:
        from transformers import TrainingArguments

        from optical.training import pretraining, recipes

        config = self.config
        if config.encoder_options:
            options = config.encoder_options
            folder = self.encoder_folder
            yield training_cell(
                "encoder",
                "encoder",
                folder,
                lambda: pretraining.encoder_trainer(
                    options,
                    TrainingArguments(
                        **recipes.ARGUMENT_DEFAULTS
                        | config.encoder_arguments
                        | _quiet(folder, config.seeds[0])
                    ),
                ),
                options,
                config.encoder_arguments,
            )
        if config.teacher_options:
            teacher_options = dataclasses.replace(config.teacher_options, model=self.teacher_start)
            teacher_folder = self.teacher_folder
            yield training_cell(
                "teacher",
                "teacher",
                teacher_folder,
                lambda: recipes.teacher(
                    teacher_options,
                    recipes.arguments(
                        **config.teacher_arguments | _quiet(teacher_folder, config.seeds[0])
                    ),
                ),
                teacher_options,
                config.teacher_arguments,
            )
        for role in config.roles:
            for language in config.ceiling:
                if not self.searched(language, role):
                    continue
                ceiling = ArmConfig(CEILING, "none", {}, {}, "both")
                yield self.evaluation_cell(ceiling, language, 0, role)

    def _token_cells(self) -> Iterator[Cell]:
        config = self.config
        for language in (*config.languages, *config.ceiling):
            if any(self.searched(language, role) for role in config.roles):
                yield self.token_cell(language)

    def _jobs(self) -> Iterator[tuple[ArmConfig, str, int, str]]:
        config = self.config
        seeds = sorted({*config.seeds, *(seed for arm in config.arms for seed in arm.seeds)})
        for seed in seeds:
            for arm in config.arms:
                own = arm.seeds or config.seeds
                if seed not in (own if self.seeded(arm) else config.seeds[:1]):
                    continue
                for language in config.languages:
                    for role in config.roles:
                        if self.searched(language, role):
                            yield arm, language, seed, role

    def _job_cells(self, arm: ArmConfig, language: str, seed: int, role: str) -> Iterator[Cell]:
        yield from self._training_cells(arm, language, seed, role)
        for table in arm.translate.values():
            yield from self._lexicon_cells(table, language, role)
        yield self.evaluation_cell(arm, language, seed, role)
        if self.config.word_alignment and arm.recipe != "bm25":
            yield from self._lexicon_cells(self.config.word_alignment["lexicon"], language, role)
            yield self.word_cell(arm, language, seed, role)

    def _training_cells(
        self, arm: ArmConfig, language: str, seed: int, role: str
    ) -> Iterator[Cell]:
        """The training of an arm's model, behind everything that it needs."""
        from optical.training import recipes

        config, seed = self.config, self.seed_of(arm, seed)
        options = self.options(arm, language, seed, role)
        if options is None:
            return
        for start in arm.start:
            if start not in (TEACHER, ENCODER):
                yield from self._training_cells(config.arm(start), language, seed, role)
        for name in arm.lexicons(config):
            for one in self.languages(arm, language):
                yield from self._lexicon_cells(name, one, role)
        limit = arm.arguments.get("max_length")
        length = limit.get(role) if isinstance(limit, dict) else limit
        if config.store_teacher and arm.recipe == "distill":
            stores = [self._vector_cell(path, role, length) for path in options.bitext]
            options.teacher_vectors = [str(cell.mark.parent) for cell in stores]
            yield from stores
        folder = Path(self.student_name(arm, language, seed, role)).parent
        recipe = getattr(recipes, arm.recipe)
        where = ALL if arm.multilingual else language
        yield training_cell(
            f"{arm.name} {where} seed {seed}{self.of_role(role)}",
            arm.recipe,
            folder,
            lambda: recipe(options, recipes.arguments(**arm.arguments | _quiet(folder, seed))),
            options,
            arm.arguments,
        )

    def _lexicon_cells(self, name: str, language: str, role: str) -> Iterator[Cell]:
        """The making of a word table of the study, with what it needs; nothing for a file."""
        config = self.config
        if name not in config.lexicons:
            return
        made = config.lexicons[name]
        mark = Path(self.table(name, language, role))
        arm = config.arm(made.arm) if made.arm else None
        if arm:
            yield from self._training_cells(arm, language, config.seeds[0], role)

        def run() -> None:
            from optical.data.lexicon import induce_lexicon, lexicon_from_links, write_lexicon
            from optical.data.pairs import read_bitext_pairs
            from optical.models.retriever import load_retriever
            from optical.models.word_alignment import word_links

            pairs = [
                pair
                for path in filled(made.bitext, [language])
                for pair in read_bitext_pairs(path)[: made.max_pairs]
            ]
            limits: dict[str, Any] = {
                "least_probability": made.least_probability,
                "least_count": made.least_count,
            }
            if arm is None:
                write_lexicon(induce_lexicon(pairs, **limits), mark)
                return
            model = self.student_name(arm, language, config.seeds[0], role)
            towers = load_retriever(model), load_retriever(self.teacher_name)
            links = (
                (english, foreign, share)
                for found in word_links(*towers, pairs, role=role)
                for (english, foreign), share in found.items()
            )
            write_lexicon(lexicon_from_links(links, **limits), mark)

        yield Cell(f"lexicon {name} {language}{self.of_role(role)}", "lexicon", mark, 1.0, run)

    def _vector_cell(self, bitext: str, role: str, length: int | None) -> Cell:
        parts = [self.prints.files(bitext), self.prints.model(self.teacher_name), role, length]
        stem = file_name(Path(bitext.split(",")[-1]).name.split(".")[0])
        folder = self.output / "vectors" / f"{stem}-{self.prints.of(parts)}"

        def run() -> None:
            from optical.data.pairs import read_bitext_pairs
            from optical.models.retriever import load_retriever
            from optical.models.token_store import write_vectors

            english = [pair[0] for pair in read_bitext_pairs(bitext)]
            model = load_retriever(self.teacher_name)
            write_vectors(model, english, folder, role=role, max_length=length)

        label = f"teacher vectors {stem}{self.of_role(role)}"
        return Cell(label, "vectors", folder / "index.json", 10.0, run)

    def run(self) -> Path:
        """Run what is not finished, then write the report. Returns the path of report.md."""
        cells = self.cells()
        started = time.monotonic()
        run_cells(self.config.title, cells, self.output)
        report = self.report(cells)
        logger.info("%s written in %s", report, duration(time.monotonic() - started))
        return report

    def report(self, cells: list[Cell]) -> Path:
        """Write the report from the finished cells."""
        from optical.report.report import write_report

        results = [
            read_json(cell.mark)
            for cell in cells
            if cell.mark.suffix == ".json" and cell.mark.parent.name == "results"
        ]
        costs = Costs(self.output).read(cells)
        folder = writable_folder(self.output / self.config.report)
        return write_report(self.config, results, costs, folder)


def _quiet(folder: Path, seed: int) -> dict[str, Any]:
    """Arguments that a study sets itself: where, which seed, and no bars in its log."""
    return {"output_dir": str(folder), "seed": seed, "disable_tqdm": True}
