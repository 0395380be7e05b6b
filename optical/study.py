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
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from optical import phrasebook
from optical.arms import ENCODER, TEACHER, ArmConfig, filled, pairs_read
from optical.cells import Cell, Costs, duration, run_cells, training_cell
from optical.collections import Collection, load_collection
from optical.config import StudyConfig, read_config
from optical.files import writable_folder, write_text
from optical.fingerprints import Fingerprints, effective

logger = logging.getLogger("optical")

CEILING = "English documents"
# Models of all languages are called so.
ALL = "all"


def run_study(config: str | Path | None, output: str | Path | None = None) -> Path:
    """Run a study to its report, continuing what an earlier run of it finished.

    Args:
        config: YAML file (the keys are documented in docs/study.md and ``optical.config``); None
            runs the embedded demonstration on the phrasebook.
        output: folder for everything that is written; None takes the configuration's ``output``.

    Returns:
        The path of ``report.md``; ``report.html``, ``results.csv`` and ``figures/`` are beside it.

    Raises:
        ValueError, FileNotFoundError, OSError: the configuration or a file it names is wrong, or
            the output folder cannot be written; found before any training starts.
    """
    study = Study(read_config(config, output))
    study.check()
    return study.run()


class Study:
    """A configuration bound to its output folder."""

    def __init__(self, config: StudyConfig) -> None:
        self.config = config
        self.output = writable_folder(config.output)
        self.prints = Fingerprints(self.output)
        if config.phrasebook:
            phrasebook.write(self.output / "data")
        for name in ("models", "lexicons", "vectors", "results", "runs", "figures"):
            writable_folder(self.output / name)

    def check(self) -> None:
        """Read every input once, so that what is wrong shows before any training."""
        from optical.bitext import read_pairs
        from optical.encoder import check_model, read_sentences
        from optical.evaluation import evaluate
        from optical.training import arguments
        from optical.training_pairs import read_training_pairs

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
                read_pairs(path)
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
                    read_pairs(path)
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
                read_pairs(path)
        for language in (*config.languages, *config.ceiling):
            for name in config.collections:
                self.collection(name, language)

    def _check_arm(self, arm: ArmConfig, language: str) -> None:
        from optical.bitext import read_pairs
        from optical.encoder import check_model
        from optical.lexicon import read_lexicon
        from optical.texts import read_texts
        from optical.training import arguments

        for side, table in arm.translate.items():
            if table not in self.config.lexicons:
                read_lexicon(filled(table, [language]))
            if side in arm.replace:
                raise ValueError(f"{side}: both translated and replaced; expected one of them")
        for path in arm.replace.values():
            for name in self.config.collections:
                read_texts(filled(path, [language]).replace("{collection}", name))
        options = arm.options(language, "teacher", self.config)
        if options is None:
            return
        options.validate()
        arguments(self.output, **arm.arguments)
        if getattr(options, "student", ""):
            check_model(options.student)
        for path in getattr(options, "bitext", []):
            read_pairs(path)
        for entry in getattr(options, "lexicon", []):
            path = entry.split("=", 1)[1]
            if path not in self.config.lexicons:
                read_lexicon(path)

    def collection(self, name: str, language: str) -> Collection:
        """Load one collection with the documents (or queries) of one language."""
        parts = self.config.collections[name]
        texts = {key: filled(value, [language]) for key, value in parts.items() if key != "role"}
        return load_collection(texts.pop("source", None), name=name, **texts)

    # The cells, in the order in which they run.

    def cells(self) -> list[Cell]:
        every = [
            *self._base_cells(),
            *(cell for job in self._jobs() for cell in self._job_cells(*job)),
            *self._alignment_cells(),
        ]
        # What several arms need stands once, where it is needed first.
        first: dict[Path, Cell] = {}
        for cell in every:
            first.setdefault(cell.mark, cell)
        return list(first.values())

    def _base_cells(self) -> Iterator[Cell]:
        from transformers import TrainingArguments

        from optical import encoder, training

        config = self.config
        if config.encoder_options:
            options = config.encoder_options
            folder = self.encoder_folder
            yield training_cell(
                "encoder",
                "encoder",
                folder,
                lambda: encoder.encoder_trainer(
                    options,
                    TrainingArguments(
                        **training.ARGUMENT_DEFAULTS
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
                lambda: training.teacher(
                    teacher_options,
                    training.arguments(
                        **config.teacher_arguments | _quiet(teacher_folder, config.seeds[0])
                    ),
                ),
                teacher_options,
                config.teacher_arguments,
            )
        for role in config.roles:
            for language in config.ceiling:
                ceiling = ArmConfig(CEILING, "none", {}, {}, "both")
                yield self._evaluation_cell(ceiling, language, 0, role)
        for language in (*config.languages, *config.ceiling):
            yield self._token_cell(language)

    def _jobs(self) -> Iterator[tuple[ArmConfig, str, int, str]]:
        config = self.config
        seeds = sorted({*config.seeds, *(seed for arm in config.arms for seed in arm.seeds)})
        for seed in seeds:
            for arm in config.arms:
                own = arm.seeds or config.seeds
                # An arm without training is the same for every seed.
                if seed not in (own if arm.trains else config.seeds[:1]):
                    continue
                for language in config.languages:
                    for role in config.roles:
                        yield arm, language, seed, role

    def _job_cells(self, arm: ArmConfig, language: str, seed: int, role: str) -> Iterator[Cell]:
        yield from self._training_cells(arm, language, seed, role)
        for table in arm.translate.values():
            yield from self._lexicon_cells(table, language, role)
        yield self._evaluation_cell(arm, language, seed, role)
        if self.config.word_alignment and arm.recipe != "bm25":
            yield from self._word_cells(arm, language, seed, role)

    def _training_cells(
        self, arm: ArmConfig, language: str, seed: int, role: str
    ) -> Iterator[Cell]:
        """The training of an arm's model, behind everything that it needs."""
        from optical import training

        config = self.config
        options = self._options(arm, language, seed, role)
        if options is None:
            return
        if arm.start not in ("", TEACHER, ENCODER):
            yield from self._training_cells(config.arm(arm.start), language, seed, role)
        for name in arm.lexicons(config):
            for one in self._languages(arm, language):
                yield from self._lexicon_cells(name, one, role)
        limit = arm.arguments.get("max_length")
        length = limit.get(role) if isinstance(limit, dict) else limit
        if config.store_teacher and arm.recipe == "distill":
            stores = [self._vector_cell(path, role, length) for path in options.bitext]
            options.teacher_vectors = [str(cell.mark.parent) for cell in stores]
            yield from stores
        folder = Path(self.student_name(arm, language, seed, role)).parent
        recipe = getattr(training, arm.recipe)
        where = ALL if arm.multilingual else language
        yield training_cell(
            f"{arm.name} {where} seed {seed}{self._of_role(role)}",
            arm.recipe,
            folder,
            lambda: recipe(options, training.arguments(**arm.arguments | _quiet(folder, seed))),
            options,
            arm.arguments,
        )

    def _evaluation_cell(self, arm: ArmConfig, language: str, seed: int, role: str) -> Cell:
        config = self.config
        model = self.student_name(arm, language, seed, role)
        names = [name for name in config.collections if config.role_of(name) == role]
        parts = self._evaluation_parts(arm, model, language, role, names)
        stem = f"{_file_name(arm.name)}-{language}-{seed}-{self.prints.of(parts)}"
        mark = self.output / "results" / f"{stem}.json"

        def run() -> None:
            from optical.evaluation import evaluate
            from optical.runs import write_run

            found: dict[str, Any] = {}
            searcher = self._searcher(arm, model, role)
            for name in names:
                collection = self._read_by(arm, self.collection(name, language), language, role)
                ranking = searcher(collection)
                path = self.output / "runs" / f"{name}.{stem}.run.gz"
                write_run(ranking, path, tag=f"optical-{_file_name(arm.name)}")
                found[name] = evaluate(ranking, collection.qrels, config.measures).per_query
            row = {
                "arm": arm.name,
                "language": language,
                "seed": seed,
                "measures": found,
                "pairs": self._pairs(arm, language),
            }
            write_text(mark, json.dumps(row) + "\n")

        label = f"evaluate {arm.name} {language} seed {seed}{self._of_role(role)}"
        return Cell(label, "evaluate", mark, 1.0, run)

    def _searcher(self, arm: ArmConfig, model: str, role: str) -> Any:
        """A function that searches a collection as the arm does."""
        from optical.bm25 import search_bm25
        from optical.encoder import load_retriever
        from optical.search import search

        if arm.recipe == "bm25":
            return lambda collection: search_bm25(collection, **arm.settings)
        student = load_retriever(model)
        teacher = student if arm.encodes == "both" else load_retriever(self.teacher_name)
        queries, documents = (student, teacher) if role == "query" else (teacher, student)
        return lambda collection: search(
            queries,
            collection,
            document_model=documents,
            passage_length=self.config.passage_length,
            passage_stride=self.config.passage_stride,
            progress=False,
        )

    def _read_by(
        self, arm: ArmConfig, collection: Collection, language: str, role: str
    ) -> Collection:
        """The collection with the texts that the arm reads: translated, or as they are."""
        from optical.lexicon import inverted, read_lexicon, translate
        from optical.texts import read_texts

        texts: dict[str, Any] = {
            "queries": collection.queries,
            "documents": collection.documents,
        }
        for side, path in arm.replace.items():
            where = filled(path, [language]).replace("{collection}", collection.name)
            given = read_texts(where)
            missing = [key for key in texts[side] if key not in given]
            if missing:
                raise ValueError(
                    f"{where}: no text for {len(missing)} {side} of {collection.name}, such as "
                    f"{missing[0]!r}; add them"
                )
            texts[side] = {key: given[key] for key in texts[side]}
        for side, table in arm.translate.items():
            lexicon = read_lexicon(self._table(table, language, role))
            foreign = "queries" if role == "query" else "documents"
            chosen = inverted(lexicon) if side == foreign else lexicon
            texts[side] = {key: translate(text, chosen) for key, text in texts[side].items()}
        return dataclasses.replace(collection, **texts)

    def _lexicon_cells(self, name: str, language: str, role: str) -> Iterator[Cell]:
        """The making of a word table of the study, with what it needs; nothing for a file."""
        config = self.config
        if name not in config.lexicons:
            return
        made = config.lexicons[name]
        mark = Path(self._table(name, language, role))
        arm = config.arm(made.arm) if made.arm else None
        if arm:
            yield from self._training_cells(arm, language, config.seeds[0], role)

        def run() -> None:
            from optical.alignment import word_links
            from optical.bitext import read_pairs
            from optical.encoder import load_retriever
            from optical.lexicon import from_links, induce, write_lexicon

            pairs = [
                pair
                for path in filled(made.bitext, [language])
                for pair in read_pairs(path)[: made.max_pairs]
            ]
            limits: dict[str, Any] = {
                "least_probability": made.least_probability,
                "least_count": made.least_count,
            }
            if arm is None:
                write_lexicon(induce(pairs, **limits), mark)
                return
            model = self.student_name(arm, language, config.seeds[0], role)
            towers = load_retriever(model), load_retriever(self.teacher_name)
            links = (
                (english, foreign, share)
                for found in word_links(*towers, pairs, role=role)
                for (english, foreign), share in found.items()
            )
            write_lexicon(from_links(links, **limits), mark)

        yield Cell(f"lexicon {name} {language}{self._of_role(role)}", "lexicon", mark, 1.0, run)

    def _vector_cell(self, bitext: str, role: str, length: int | None) -> Cell:
        parts = [self.prints.files(bitext), self.prints.model(self.teacher_name), role, length]
        stem = _file_name(Path(bitext.split(",")[-1]).name.split(".")[0])
        folder = self.output / "vectors" / f"{stem}-{self.prints.of(parts)}"

        def run() -> None:
            from optical.bitext import read_pairs
            from optical.encoder import load_retriever
            from optical.vectors import write_vectors

            english = [pair[0] for pair in read_pairs(bitext)]
            model = load_retriever(self.teacher_name)
            write_vectors(model, english, folder, role=role, max_length=length)

        label = f"teacher vectors {stem}{self._of_role(role)}"
        return Cell(label, "vectors", folder / "index.json", 10.0, run)

    def _alignment_cells(self) -> Iterator[Cell]:
        chosen = self.config.alignment
        arm = next((arm for arm in self.config.arms if arm.recipe == "distill"), None)
        if not chosen or arm is None:
            return
        role = self.config.role
        seed = (arm.seeds or self.config.seeds)[0]
        model = self.student_name(arm, chosen["language"], seed, role)
        parts = self.prints.of([self.prints.model(model), chosen])
        mark = self.output / "results" / f"alignment-{parts}.json"

        def run() -> None:
            from optical.alignment import align
            from optical.encoder import load_retriever

            aligned = align(
                load_retriever(model),
                load_retriever(self.teacher_name),
                chosen["other"],
                chosen["english"],
                role=role,
            )
            write_text(mark, json.dumps({"language": chosen["language"], **aligned}) + "\n")

        yield Cell("alignment", "evaluate", mark, 0.2, run)

    def _word_cells(self, arm: ArmConfig, language: str, seed: int, role: str) -> Iterator[Cell]:
        """How far an arm's plans link the words that a word table calls translations."""
        chosen = self.config.word_alignment
        assert chosen is not None
        yield from self._lexicon_cells(chosen["lexicon"], language, role)
        model = self.student_name(arm, language, seed, role)
        bitext = filled(chosen["bitext"], [language])
        table = self._table(chosen["lexicon"], language, role)
        models = [self.prints.model(model), self.prints.model(self.teacher_name)]
        parts = [models, self.prints.files([bitext, table]), chosen["max_pairs"], role]
        name = f"words-{_file_name(arm.name)}-{language}-{seed}-{self.prints.of(parts)}.json"
        mark = self.output / "results" / name

        def run() -> None:
            from optical.alignment import alignment_error_rate, word_links
            from optical.bitext import read_pairs
            from optical.encoder import load_retriever
            from optical.lexicon import read_lexicon

            pairs = read_pairs(bitext)[: chosen["max_pairs"]]
            towers = load_retriever(model), load_retriever(self.teacher_name)
            links = word_links(*towers, pairs, role=role)
            rate, sure = alignment_error_rate(links, pairs, read_lexicon(table))
            row = {"arm": arm.name, "language": language, "seed": seed, "role": role}
            write_text(mark, json.dumps({**row, "aer": rate, "links": sure}) + "\n")

        label = f"words {arm.name} {language} seed {seed}{self._of_role(role)}"
        yield Cell(label, "words", mark, 0.5, run)

    def _token_cell(self, language: str) -> Cell:
        """How finely the tokenizers cut a language, and what they do not know of it."""
        config = self.config
        names = {TEACHER: self.teacher_name}
        if any(arm.start == ENCODER for arm in config.arms):
            names[ENCODER] = self.encoder_name
        parts = [
            {key: self.prints.model(name) for key, name in names.items()},
            self._files(list(config.collections), language),
        ]
        mark = self.output / "results" / f"tokens-{language}-{self.prints.of(parts)}.json"

        def run() -> None:
            from transformers import AutoTokenizer

            from optical.encoder import fertility, located

            texts: list[str] = []
            for name in config.collections:
                collection = self.collection(name, language)
                query = config.role_of(name) == "query"
                texts += (collection.queries if query else collection.documents).values()
            row = {
                key: fertility(AutoTokenizer.from_pretrained(located(name)), texts)
                for key, name in names.items()
            }
            write_text(mark, json.dumps({"language": language, "tokens": row}) + "\n")

        return Cell(f"tokens {language}", "words", mark, 0.1, run)

    # Where cells keep their results: every name carries the fingerprint of what it depends on.

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
        options = self._options(arm, language, seed, role)
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
        name = f"{_file_name(arm.name)}-{where}-{seed}-{self.prints.of(parts)}"
        return str(self.output / "models" / name / "final")

    def _options(self, arm: ArmConfig, language: str, seed: int, role: str) -> Any:
        """An arm's options with every model and word table in its place."""
        if arm.start == ENCODER:
            start = self.encoder_name
        elif arm.start in ("", TEACHER):
            start = self.teacher_name if arm.recipe != "distill" else ""
        else:
            start = self.student_name(self.config.arm(arm.start), language, seed, role)
        return arm.options(
            self._languages(arm, language),
            self.teacher_name,
            self.config,
            role=role,
            start=start,
            lexicon=lambda name, one: self._table(name, one, role),
        )

    def _languages(self, arm: ArmConfig, language: str) -> list[str]:
        return list(self.config.languages) if arm.multilingual else [language]

    def _table(self, name: str, language: str, role: str) -> str:
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
        return str(self.output / "lexicons" / f"{_file_name(name)}-{language}-{parts}.tsv")

    def _evaluation_parts(
        self, arm: ArmConfig, model: str, language: str, role: str, names: list[str]
    ) -> Any:
        config = self.config
        tables = {side: self._table(table, language, role) for side, table in arm.translate.items()}
        replaced = {
            side: [filled(path, [language]).replace("{collection}", name) for name in names]
            for side, path in arm.replace.items()
        }
        parts: list[Any] = [
            self._files(names, language),
            list(config.measures),
            role,
            self.prints.files([tables, replaced]),
        ]
        if arm.recipe == "bm25":
            return [*parts, arm.recipe, arm.settings]
        models = [self.prints.model(model), self.prints.model(self.teacher_name)]
        return [*parts, models, arm.encodes, config.passage_length, config.passage_stride]

    def _files(self, names: list[str], language: str) -> Any:
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

    def _pairs(self, arm: ArmConfig, language: str) -> int | None:
        """How many sentence pairs of a language an arm learns from."""
        from optical.bitext import read_pairs

        read = pairs_read(arm, language)
        counts = [len(read_pairs(path)[: read["max_pairs"]]) for path in read["bitext"]]
        return sum(counts) if counts else None

    def _of_role(self, role: str) -> str:
        """The end of a label, where a study has cells of both roles."""
        return f" {role}" if len(self.config.roles) > 1 else ""

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
        from optical.report import write_report

        results = [
            json.loads(cell.mark.read_text(encoding="utf-8"))
            for cell in cells
            if cell.mark.suffix == ".json" and cell.mark.parent.name == "results"
        ]
        costs = Costs(self.output / "costs.json").read()
        return write_report(self.config, results, costs, self.output)


def _quiet(folder: Path, seed: int) -> dict[str, Any]:
    """Arguments that a study sets itself: where, which seed, and no bars in its log."""
    return {"output_dir": str(folder), "seed": seed, "disable_tqdm": True}


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "_" for c in text.lower())
