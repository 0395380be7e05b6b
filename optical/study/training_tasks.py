"""Tasks that train models, induce lexicons and store the token vectors of the teacher."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from optical.io.files import write_json
from optical.report.stored import LOSSES
from optical.study.arms import ENCODER, TEACHER, ArmConfig, fill_languages
from optical.study.layout import ALL_LANGUAGES, Layout, file_name
from optical.study.tasks import Task
from optical.training.options import TRAINER_DEFAULTS, WITHOUT_STEPS, DistillOptions

# Default cost per training token, by recipe; measured times replace it as tasks finish.
COST = {"encoder": 4.0, "teacher": 2.0, "codeswitch": 2.0, "distill": 1.0}
COST |= dict.fromkeys(WITHOUT_STEPS, 0.1)


class TrainingTasks:
    """Builds the training tasks of a study, each after the tasks that it depends on."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def base_models(self) -> Iterator[Task]:
        """Yield the trainings of the encoder and of the teacher."""
        layout, config = self.layout, self.layout.config
        seed = config.seeds[0]
        if config.encoder_options:
            yield training_task(
                "encoder",
                "encoder",
                layout.encoder_folder,
                config.encoder_options,
                config.encoder_trainer_args,
                seed,
            )
        if config.teacher_options:
            options = dataclasses.replace(config.teacher_options, model=layout.teacher_start)
            yield training_task(
                "teacher",
                "teacher",
                layout.teacher_folder,
                options,
                config.teacher_trainer_args,
                seed,
            )

    def model(self, arm: ArmConfig, language: str, seed: int, role: str) -> Iterator[Task]:
        """Yield the training of an arm's model, after the tasks that it depends on."""
        layout, config = self.layout, self.layout.config
        seed = layout.effective_seed(arm, seed)
        options = layout.options(arm, language, seed, role)
        if options is None:
            return
        for start in arm.start:
            if start not in (TEACHER, ENCODER):
                yield from self.model(config.arm(start), language, seed, role)
        for name in arm.induced_lexicons(config):
            for training_language in layout.training_languages(arm, language):
                yield from self.lexicon(name, training_language, role)
        max_length = arm.trainer_args.get("max_length")
        if isinstance(max_length, dict):
            max_length = max_length.get(role)
        if config.store_teacher and arm.recipe == "distill":
            stores = [self.teacher_vectors(path, options, max_length) for path in options.bitext]
            options.teacher_vectors = [str(task.output.parent) for task in stores]
            yield from stores
        languages = ALL_LANGUAGES if arm.multilingual else language
        yield training_task(
            f"{arm.name} {languages} seed {seed}{layout.role_suffix(role)}",
            arm.recipe,
            Path(layout.model_name(arm, language, seed, role)).parent,
            options,
            arm.trainer_args,
            seed,
        )

    def lexicon(self, name: str, language: str, role: str) -> Iterator[Task]:
        """Yield the induction of a lexicon, after its training; nothing for an existing file."""
        layout, config = self.layout, self.layout.config
        if name not in config.lexicons:
            return
        source = config.lexicons[name].arm
        if source:
            yield from self.model(config.arm(source), language, config.seeds[0], role)
        output = Path(layout.lexicon_path(name, language, role))
        run = functools.partial(self._induce_lexicon, name, language, role, output)
        label = f"lexicon {name} {language}{layout.role_suffix(role)}"
        yield Task(label, "lexicon", output, 1.0, run)

    def _induce_lexicon(self, name: str, language: str, role: str, output: Path) -> None:
        from optical.data.lexicon import induce_lexicon, lexicon_from_links, write_lexicon
        from optical.data.pairs import iter_distinct_pairs
        from optical.models.retriever import load_retriever
        from optical.models.word_alignment import word_links

        layout, config = self.layout, self.layout.config
        lexicon = config.lexicons[name]
        pairs = (
            pair
            for path in fill_languages(lexicon.bitext, [language])
            for pair in iter_distinct_pairs(path, max_pairs=lexicon.max_pairs)
        )
        limits: dict[str, Any] = {
            "least_probability": lexicon.least_probability,
            "least_count": lexicon.least_count,
        }
        if not lexicon.arm:
            write_lexicon(induce_lexicon(pairs, **limits), output)
            return
        student = layout.model_name(config.arm(lexicon.arm), language, config.seeds[0], role)
        models = load_retriever(student), load_retriever(layout.teacher_name)
        links = (
            (english, foreign, share)
            for pair_links in word_links(*models, list(pairs), role=role)
            for (english, foreign), share in pair_links.items()
        )
        write_lexicon(lexicon_from_links(links, **limits), output)

    def teacher_vectors(self, bitext: str, options: DistillOptions, max_length: int | None) -> Task:
        """Return the task that stores the teacher's token vectors of one bitext file.

        Args:
            bitext: file of parallel sentences.
            options: options of the arm, which reads the sentences in its role.
            max_length: length limit of the arm, in tokens.
        """
        role, max_pairs, characters = options.role, options.max_pairs, options.join_characters
        layout = self.layout
        fingerprints = layout.fingerprints
        inputs = [
            fingerprints.files(bitext),
            fingerprints.model(layout.teacher_name),
            role,
            max_length,
            *([max_pairs, characters] if max_pairs or characters else []),
        ]
        stem = file_name(Path(bitext.split(",")[-1]).name.split(".")[0])
        folder = layout.output / "vectors" / f"{stem}-{fingerprints.of(inputs)}"

        def run() -> None:
            from optical.data.pairs import join_pairs, read_bitext_pairs
            from optical.models.retriever import load_retriever
            from optical.models.token_store import write_vectors

            pairs = join_pairs(read_bitext_pairs(bitext)[:max_pairs], characters)
            english = [source for source, _ in pairs]
            model = load_retriever(layout.teacher_name)
            write_vectors(model, english, folder, role=role, max_length=max_length)

        label = f"teacher vectors {stem}{layout.role_suffix(role)}"
        return Task(label, "vectors", folder / "index.json", 10.0, run)


def training_task(
    label: str,
    recipe: str,
    folder: Path,
    options: Any,
    trainer_args: Mapping[str, Any],
    seed: int,
) -> Task:
    """Return the task that trains a model into `folder`, resuming from its last checkpoint."""
    steps = trainer_args.get("max_steps", 1000)
    batch_size = trainer_args.get("per_device_train_batch_size", 64)
    work = COST[recipe] * steps * batch_size / 1000
    # Progress bars would break the lines of the study's log.
    study_args = {"output_dir": str(folder), "seed": seed, "disable_tqdm": True}
    run = functools.partial(_train, label, recipe, folder, options, {**trainer_args, **study_args})
    return Task(f"train {label}", recipe, folder / "final" / "config.json", work, run)


def _train(
    label: str, recipe: str, folder: Path, options: Any, trainer_args: dict[str, Any]
) -> None:
    from transformers import TrainingArguments

    from optical import training
    from optical.training import recipes, runner

    if recipe in WITHOUT_STEPS:
        model = getattr(training, recipe)(options)
        runner.save(model, options, recipes.trainer_arguments(**trainer_args))
        return
    if recipe == "encoder":
        defaults = TRAINER_DEFAULTS | recipes.device_arguments()
        args = TrainingArguments(**{**defaults, **trainer_args})
        trainer = training.encoder_trainer(options, args)
    else:
        trainer = getattr(training, recipe)(options, recipes.trainer_arguments(**trainer_args))
    trainer.add_callback(runner.ProgressLines(label))
    runner.run(trainer, options, resume=True)
    write_json(folder / LOSSES, trainer.state.log_history)
    # A finished task needs no checkpoints; the optimizer states of many tasks would fill the disk.
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
