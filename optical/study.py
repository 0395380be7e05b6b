"""The main job: train every arm, search, evaluate, and compare, from one configuration file.

A study is a list of cells, each in a folder of its own under the output folder:

    models/encoder-<print>      tokenizer and encoder, where the configuration trains one
    models/teacher-<print>      the English retriever
    models/<arm>-<language>-<seed>-<print>   one trained student
    results/<arm>-<language>-<seed>-<print>.json   its measures, query by query (and runs/*.run.gz)

<print> is a fingerprint of everything the cell depends on: its options, the contents of its input
files and the fingerprints of the cells before it. So a study that was interrupted, or whose
configuration grew, continues where it stopped; what is finished is never run again, and what
changed is never mistaken for what is there. The report is made from the results alone.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from optical import phrasebook
from optical.collections import Collection, load_collection
from optical.config import ArmConfig, StudyConfig, read_config
from optical.files import writable_folder, write_text

logger = logging.getLogger("optical")

CEILING = "English documents"
# Arguments of the trainer that change what is kept and said, never what is learnt.
WITHOUT_EFFECT = ("save_steps", "save_strategy", "save_total_limit", "logging_steps", "report_to")
# Relative cost of a training token, by recipe, until a finished cell of the kind tells better.
COST = {"encoder": 4.0, "teacher": 2.0, "codeswitch": 2.0, "distill": 1.0}


@dataclass
class Cell:
    """One unit of work that is either finished, with its file in place, or not."""

    label: str
    kind: str
    mark: Path
    work: float
    run: Callable[[], None]

    @property
    def done(self) -> bool:
        return self.mark.exists()


@dataclass
class Progress:
    """Tells after each cell how long the rest will take, from what finished cells took."""

    seconds: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)

    def add(self, cell: Cell, seconds: float) -> None:
        self.seconds[cell.kind] = self.seconds.get(cell.kind, 0.0) + seconds
        self.work[cell.kind] = self.work.get(cell.kind, 0.0) + cell.work

    def left(self, cells: list[Cell]) -> float | None:
        """Seconds for `cells`, or None while nothing is known."""
        known = sum(self.seconds.values()), sum(self.work.values())
        if not known[1]:
            return None
        total = 0.0
        for cell in cells:
            seconds, work = self.seconds.get(cell.kind, 0.0), self.work.get(cell.kind, 0.0)
            rate = seconds / work if work else known[0] / known[1]
            total += rate * cell.work
        return total


def run_study(config: str | Path | None, output: str | Path | None = None) -> Path:
    """Run a study to its report, continuing what an earlier run of it finished.

    Args:
        config: YAML file (the keys are documented in docs/study.md and ``optical.config``); None
            runs the embedded demonstration on the phrasebook.
        output: folder for everything that is written; None takes the configuration's ``output``.

    Returns:
        The path of ``report.md``; ``report.html`` and ``figures/`` are beside it.

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
        if config.phrasebook:
            phrasebook.write(self.output / "data")
        for name in ("models", "results", "runs", "figures"):
            writable_folder(self.output / name)

    def check(self) -> None:
        """Read every input once, so that what is wrong shows before any training."""
        from optical.bitext import read_pairs
        from optical.codeswitch import read_lexicon
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
            dataclasses.replace(taught, model=self.encoder_name).validate()
            arguments(self.output, **config.teacher_arguments)
            read_training_pairs(taught.pairs, taught.queries, taught.passages)
        for arm in config.arms:
            for language in config.languages:
                options = arm.options(language, "teacher", config)
                if options is None:
                    continue
                try:
                    options.validate()
                    arguments(self.output, **arm.arguments)
                    if getattr(options, "student", ""):
                        check_model(options.student)
                    for path in getattr(options, "bitext", []):
                        read_pairs(path)
                    for entry in getattr(options, "lexicon", []):
                        read_lexicon(entry.split("=", 1)[1])
                except (OSError, ValueError) as error:
                    raise ValueError(
                        f"arm {arm.name}, language {language}: {error}; "
                        "mend the file, or leave the arm or the language out"
                    ) from None
        for language in (*config.languages, *config.ceiling):
            for name in config.collections:
                self.collection(name, language)

    def collection(self, name: str, language: str) -> Collection:
        """Load one collection with the documents (or queries) of one language."""
        parts = self.config.collections[name]
        filled = {key: value.replace("{language}", language) for key, value in parts.items()}
        return load_collection(filled.pop("source", None), name=name, **filled)

    # The cells, in the order in which they run.

    def cells(self) -> list[Cell]:
        return [
            *self._base_cells(),
            *(cell for job in self._jobs() for cell in self._job_cells(*job)),
            *self._alignment_cells(),
        ]

    def _base_cells(self) -> Iterator[Cell]:
        from transformers import TrainingArguments

        from optical import encoder, training

        config = self.config
        if config.encoder_options:
            options = config.encoder_options
            folder = self.encoder_folder
            yield _training_cell(
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
            teacher_options = config.teacher_options
            teacher_folder = self.teacher_folder
            teacher_options.model = self.encoder_name
            yield _training_cell(
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
        for language in config.ceiling:
            yield self._evaluation_cell(CEILING, language, 0, self.teacher_name, "both")

    def _jobs(self) -> Iterator[tuple[ArmConfig, str, int]]:
        for seed in self.config.seeds:
            for arm in self.config.arms:
                # An arm without training is the same for every seed.
                if arm.recipe == "none" and seed != self.config.seeds[0]:
                    continue
                for language in self.config.languages:
                    yield arm, language, seed

    def _job_cells(self, arm: ArmConfig, language: str, seed: int) -> Iterator[Cell]:
        from optical import training

        model = self.student_name(arm, language, seed)
        options = arm.options(language, self.teacher_name, self.config)
        if options is not None:
            recipe = getattr(training, arm.recipe)
            folder = Path(model).parent
            yield _training_cell(
                f"{arm.name} {language} seed {seed}",
                arm.recipe,
                folder,
                lambda: recipe(options, training.arguments(**arm.arguments | _quiet(folder, seed))),
                options,
                arm.arguments,
            )
        yield self._evaluation_cell(arm.name, language, seed, model, arm.encodes)

    def _evaluation_cell(
        self, arm: str, language: str, seed: int, model: str, encodes: str
    ) -> Cell:
        fingerprint = self._evaluation_print(model, language, encodes)
        stem = f"{_file_name(arm)}-{language}-{seed}-{fingerprint}"
        mark = self.output / "results" / f"{stem}.json"

        def run() -> None:
            from optical.encoder import load_retriever
            from optical.evaluation import evaluate
            from optical.runs import write_run
            from optical.search import search

            student = load_retriever(model)
            teacher = student if encodes == "both" else load_retriever(self.teacher_name)
            towers = (student, teacher) if self.config.role == "query" else (teacher, student)
            found: dict[str, Any] = {}
            for name in self.config.collections:
                collection = self.collection(name, language)
                ranking = search(towers[0], collection, document_model=towers[1], progress=False)
                path = self.output / "runs" / f"{name}.{stem}.run.gz"
                write_run(ranking, path, tag=f"optical-{_file_name(arm)}")
                found[name] = evaluate(ranking, collection.qrels, self.config.measures).per_query
            row = {"arm": arm, "language": language, "seed": seed, "measures": found}
            write_text(mark, json.dumps(row) + "\n")

        return Cell(f"evaluate {arm} {language} seed {seed}", "evaluate", mark, 1.0, run)

    def _alignment_cells(self) -> Iterator[Cell]:
        chosen = self.config.alignment
        arm = next((arm for arm in self.config.arms if arm.recipe == "distill"), None)
        if not chosen or arm is None:
            return
        model = self.student_name(arm, chosen["language"], self.config.seeds[0])
        mark = self.output / "results" / f"alignment-{_print([_relative(model), chosen])}.json"

        def run() -> None:
            from optical.alignment import align
            from optical.encoder import load_retriever

            aligned = align(
                load_retriever(model),
                load_retriever(self.teacher_name),
                chosen["other"],
                chosen["english"],
                role=self.config.role,
            )
            write_text(mark, json.dumps({"language": chosen["language"], **aligned}) + "\n")

        yield Cell("alignment", "evaluate", mark, 0.2, run)

    # Where cells keep their results: every name carries the fingerprint of what it depends on.

    @property
    def encoder_folder(self) -> Path:
        config = self.config
        parts = [
            _contents(config.encoder_options),
            _effective(config.encoder_arguments),
            config.seeds[0],
        ]
        return self.output / "models" / f"encoder-{_print(parts)}"

    @property
    def encoder_name(self) -> str:
        """Folder or Hugging Face name of the encoder that the teacher starts from."""
        return self.config.encoder or str(self.encoder_folder / "final")

    @property
    def teacher_folder(self) -> Path:
        config = self.config
        parts = [
            _contents(config.teacher_options, without="model"),
            _effective(config.teacher_arguments),
            config.seeds[0],
            _relative(self.encoder_name),
        ]
        return self.output / "models" / f"teacher-{_print(parts)}"

    @property
    def teacher_name(self) -> str:
        return self.config.teacher or str(self.teacher_folder / "final")

    def student_name(self, arm: ArmConfig, language: str, seed: int) -> str:
        """Folder of an arm's trained model; the teacher itself for an arm without training."""
        options = arm.options(language, "", self.config)
        if options is None:
            return self.teacher_name
        parts = [
            arm.recipe,
            _contents(options),
            _effective(arm.arguments),
            seed,
            _relative(self.teacher_name),
        ]
        name = f"{_file_name(arm.name)}-{language}-{seed}-{_print(parts)}"
        return str(self.output / "models" / name / "final")

    def _evaluation_print(self, model: str, language: str, encodes: str) -> str:
        config = self.config
        files = {
            name: {
                part: (_relative if part == "source" else _digest)(
                    value.replace("{language}", language)
                )
                for part, value in parts.items()
            }
            for name, parts in config.collections.items()
        }
        models = [_relative(model), _relative(self.teacher_name)]
        return _print([models, files, list(config.measures), config.role, encodes])

    # Running

    def run(self) -> Path:
        """Run what is not finished, then write the report. Returns the path of report.md."""
        from optical.report import write_report

        cells = self.cells()
        progress = Progress()
        todo = [cell for cell in cells if not cell.done]
        logger.info(
            "%s: %d cells, %d finished before; output in %s",
            self.config.title,
            len(cells),
            len(cells) - len(todo),
            self.output,
        )
        # What finished cells took, in earlier runs too, tells what the others will take.
        times = self._times()
        for cell in cells:
            if cell.done and cell.label in times:
                progress.add(cell, times[cell.label])
        started = time.monotonic()
        for position, cell in enumerate(todo):
            begun = time.monotonic()
            cell.run()
            seconds = time.monotonic() - begun
            progress.add(cell, seconds)
            self._add_time(cell.label, seconds)
            left = progress.left(todo[position + 1 :])
            logger.info(
                "[%*d/%d] %-32s %7s, about %s left",
                len(str(len(cells))),
                len(cells) - len(todo) + position + 1,
                len(cells),
                cell.label,
                _duration(seconds),
                _duration(left or 0.0),
            )
        results = [
            json.loads(cell.mark.read_text(encoding="utf-8"))
            for cell in cells
            if cell.mark.suffix == ".json"
        ]
        report = write_report(self.config, results, self._times(), self.output)
        logger.info("%s written in %s", report, _duration(time.monotonic() - started))
        return report

    def _times(self) -> dict[str, float]:
        path = self.output / "times.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def _add_time(self, label: str, seconds: float) -> None:
        times = self._times()
        times[label] = round(times.get(label, 0.0) + seconds, 1)
        write_text(self.output / "times.json", json.dumps(times, indent=1) + "\n")


def _training_cell(
    label: str,
    kind: str,
    folder: Path,
    make_trainer: Callable[[], Any],
    options: Any,
    arguments: Mapping[str, Any],
) -> Cell:
    def run() -> None:
        from optical import training

        trainer = make_trainer()
        trainer.add_callback(training.progress_lines(label))
        training.run(trainer, options, resume=True)

    steps = arguments.get("max_steps", 1000)
    rows = arguments.get("per_device_train_batch_size", 64)
    work = COST[kind] * steps * rows / 1000
    return Cell(f"train {label}", kind, folder / "final" / "config.json", work, run)


def _quiet(folder: Path, seed: int) -> dict[str, Any]:
    """Arguments that a study sets itself: where, which seed, and no bars in its log."""
    return {"output_dir": str(folder), "seed": seed, "disable_tqdm": True}


def _effective(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT}


def _contents(options: Any, without: str = "") -> Any:
    """Options as plain data, every file and model replaced by a digest of what is in it."""
    if options is None:
        return None
    return {
        name: _relative(value) if name in ("model", "teacher", "student") else _digest_all(value)
        for name, value in vars(options).items()
        if name not in ("resume", without)
    }


def _digest_all(value: Any) -> Any:
    if isinstance(value, list):
        return [_digest_all(entry) for entry in value]
    if isinstance(value, str):
        # `file`, `language=file`, or two aligned files `corpus.en,corpus.sw`.
        whole = _digest_named(value)
        return whole if whole != value else ",".join(map(_digest_named, value.split(",")))
    return value


def _digest_named(value: str) -> str:
    whole = _digest(value)
    name, equals, path = value.partition("=")
    return whole if whole != value or not equals else f"{name}={_digest(path)}"


def _digest(value: str) -> str:
    """SHA-256 of the file that `value` names, or `value` itself where it names none."""
    try:
        stat = os.stat(value)
        return _file_digest(value, stat.st_size, stat.st_mtime_ns)
    except OSError:
        return value


@functools.lru_cache(maxsize=1000)
def _file_digest(path: str, size: int, time_ns: int) -> str:
    # Size and time are in the key alone: a changed file is read again.
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _folder_digest(folder: Path) -> str:
    """Names, sizes and times of a model or collection from elsewhere; weights are too large."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    found = [(path.relative_to(folder).as_posix(), path.stat()) for path in files]
    return _print([(name, stat.st_size, stat.st_mtime_ns) for name, stat in found])


def _relative(model: str) -> str:
    """A model of the study by its fingerprinted name, so that the output folder can be moved;
    a model from elsewhere by what is in its folder."""
    path = Path(model)
    if path.name == "final" and path.parent.parent.name == "models":
        return path.parent.name
    return _folder_digest(path) if model and path.is_dir() else model


def _print(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def _file_name(text: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "_" for c in text.lower())


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"
