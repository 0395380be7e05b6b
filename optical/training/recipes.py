"""Training recipes as configured Sentence Transformers trainers.

teacher     English late interaction from (query, passage) pairs, in-batch softmax  (recipe R0)
distill     a student distilled from a frozen teacher on parallel sentences  (recipes R1 to R4)
codeswitch  the teacher recipe on text code-switched through lexicons  (recipe R5)

The recipes ``transfer`` and ``average``, in modules of their own, have no training steps. A recipe
that trains returns a trainer, which the caller may change before ``optical.training.run`` trains,
resumes and saves. A recipe without training steps returns a model for ``optical.training.save``.
The package has no training loop: checkpoints, precision, seeds, progress bars, multi-GPU training
and model cards are those of the trainer.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from datasets import Dataset
from sentence_transformers import (
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.multi_vector_encoder.losses import (
    MultiVectorMultipleNegativesRankingLoss,
)
from transformers import AutoTokenizer, EarlyStoppingCallback, set_seed

from optical.data.lexicon import CodeSwitcher, read_lexicon
from optical.data.pairs import (
    balance_bitexts,
    bitext_dataset,
    join_pairs,
    read_bitext_pairs,
    read_training_pairs,
    stream_bitext,
)
from optical.io.settings import nearest, typed
from optical.losses import objectives
from optical.losses.distillation import (
    DistillationLoss,
    DivergenceDistillationLoss,
    OTDistillationLoss,
)
from optical.models.centering import center_vectors
from optical.models.encoding import ROLES
from optical.models.fingerprint import fingerprints, set_partners
from optical.models.retriever import DEFAULT_LENGTHS, load_retriever, resolve_model, set_dropout
from optical.models.token_store import StoredVectors
from optical.models.tokenizers import frequent_tokens, token_counts
from optical.training.collator import BitextCollator, LengthBatchSampler
from optical.training.embedding_rows import restrict_embeddings
from optical.training.options import (
    TRAINER_DEFAULTS,
    CodeswitchOptions,
    DistillOptions,
    TeacherOptions,
)

logger = logging.getLogger("optical")

# Passages whose token vectors have the mean that `center` subtracts.
_CENTERED_TEXTS = 256


@dataclass
class CommandLineTrainerArguments(MultiVectorEncoderTrainingArguments):
    """Trainer arguments whose types argparse can represent."""

    # A number, or JSON with the limits of both roles: argparse has no union types.
    max_length: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "Maximum length of a training text in tokens: 32, or "
            '\'{"query": 32, "document": 64}\'.'
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.max_length, str) and self.max_length.isdigit():
            self.max_length = int(self.max_length)  # type: ignore[assignment]
        super().__post_init__()  # type: ignore[no-untyped-call]


def trainer_arguments(
    output_dir: str | Path, **changes: Any
) -> MultiVectorEncoderTrainingArguments:
    """Return trainer arguments with the defaults of this package, TRAINER_DEFAULTS.

    Raises:
        ValueError: an argument is unknown or has a value of the wrong type. The trainer itself
            would fail only after minutes, without the name of the argument.
    """
    hints = get_type_hints(MultiVectorEncoderTrainingArguments)
    for name, value in changes.items():
        if name not in hints:
            raise ValueError(f"trainer argument {name!r} is unknown{nearest(name, hints)}")
        typed(value, hints[name], name)
    return MultiVectorEncoderTrainingArguments(
        output_dir=str(output_dir), **{**TRAINER_DEFAULTS, **device_arguments(), **changes}
    )


def device_arguments() -> dict[str, bool]:
    """Return the trainer arguments of a machine without a GPU.

    The trainer refuses bfloat16 on a CPU that nobody asked for, even if there is nothing else.
    """
    return {} if torch.accelerator.is_available() else {"use_cpu": True}


def teacher(
    options: TeacherOptions, trainer_args: MultiVectorEncoderTrainingArguments
) -> MultiVectorEncoderTrainer:
    """Configure training on (query, passage) pairs with a softmax over the passages of a batch.

    The negatives of a query are the passages of the other queries in the batch, and its explicit
    negatives. No passage occurs twice in a batch. Source: Khattab and Zaharia, ColBERT (SIGIR
    2020).
    """
    options.validate()
    training_pairs = read_training_pairs(options.pairs, options.queries, options.passages)
    validation = read_training_pairs(options.validation) if options.validation else []
    return _contrastive_trainer(options, trainer_args, training_pairs, validation)


def codeswitch(
    options: CodeswitchOptions, trainer_args: MultiVectorEncoderTrainingArguments
) -> MultiVectorEncoderTrainer:
    """Configure the teacher recipe on code-switched text (Litschko et al., arXiv 2305.05295).

    One lexicon gives the paper's bilingual variant, several the multilingual one. Texts of the role
    that is not code-switched stay unchanged.
    """
    options.validate()
    rows = read_training_pairs(options.pairs, options.queries, options.passages)
    lexicons = _read_lexicons(options.lexicon)
    switch = CodeSwitcher(lexicons, probability=options.probability, seed=trainer_args.seed)
    coverage = switch.coverage([row[-1] for row in rows[:2000]])
    logger.info("code switching: the lexicons contain %.0f %% of the words", 100 * coverage)
    switched = [
        pair
        for copy in range(options.copies)
        for pair in _switched(rows, switch, options.role, f"{copy}")
    ]
    validation = read_training_pairs(options.validation) if options.validation else []
    validation = list(_switched(validation, switch, options.role, "validation"))
    return _contrastive_trainer(options, trainer_args, switched, validation)


def _switched(
    rows: Sequence[tuple[str, ...]], switch: CodeSwitcher, role: str, key: str
) -> Iterator[tuple[str, ...]]:
    """Yield rows whose texts of a role are code-switched; `key` seeds the draws."""
    for index, (query, *passages) in enumerate(rows):
        if role != "document":
            query = switch(query, f"{key}:{index}:query")
        if role != "query":
            passages = [switch(text, f"{key}:{index}:{i}") for i, text in enumerate(passages)]
        yield query, *passages


def _contrastive_trainer(
    options: TeacherOptions,
    trainer_args: MultiVectorEncoderTrainingArguments,
    rows: list[tuple[str, ...]],
    validation: list[tuple[str, ...]],
) -> MultiVectorEncoderTrainer:
    """Configure contrastive training on rows of (query, passage, negatives...)."""
    callbacks = _evaluate(options, trainer_args)
    set_seed(trainer_args.seed)
    skip_words: list[str] = []
    if options.skip_frequent:
        name = resolve_model(options.model)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        texts = [text for row in rows for text in row]
        skip_words = frequent_tokens(tokenizer, texts, options.skip_frequent)
    model = load_retriever(
        options.model,
        dimension=options.dimension,
        query_length=options.query_length,
        document_length=options.document_length,
        query_expansion=options.query_expansion,
        skip_words=skip_words,
    )
    if options.center:
        passages = dict.fromkeys(row[1] for row in rows)
        model = center_vectors(model, list(passages)[:_CENTERED_TEXTS])
    # Training moves the vectors away from those of the models that this one was made from.
    set_partners(model, ())
    set_dropout(model, options.dropout)
    # A passage that occurs twice in a batch would be its own negative.
    trainer_args.batch_sampler = BatchSamplers.NO_DUPLICATES
    names = ["query", "positive", *(f"negative_{i}" for i in range(1, len(rows[0]) - 1))]
    trainer_args.prompts = _prompts_of_columns(model, trainer_args.prompts, names)
    if validation and len(validation[0]) < len(names):
        raise ValueError(
            f"validation: rows with {len(validation[0]) - 2} negatives, expected the number of the "
            f"training pairs, {len(names) - 2}"
        )
    dataset = _dataset_of_rows(rows, names)
    restrict_embeddings(model, options.embeddings, trainer_args, dataset)
    return MultiVectorEncoderTrainer(
        model=model,
        args=trainer_args,
        train_dataset=dataset,
        eval_dataset=_dataset_of_rows(validation, names) if validation else None,
        callbacks=callbacks,
        loss=MultiVectorMultipleNegativesRankingLoss(model, scale=options.scale),
    )


def _dataset_of_rows(rows: Sequence[tuple[str, ...]], names: Sequence[str]) -> Dataset:
    columns = zip(*(row[: len(names)] for row in rows), strict=True)
    return Dataset.from_dict(dict(zip(names, map(list, columns), strict=True)))


def _evaluate(
    options: TeacherOptions | DistillOptions, trainer_args: MultiVectorEncoderTrainingArguments
) -> list[Any]:
    """Make a trainer evaluate the validation data at each checkpoint, and keep the best one.

    Returns:
        The callbacks of early stopping.
    """
    if not options.validation:
        return []
    if trainer_args.save_strategy == "no":
        raise ValueError(
            "validation: given, but save_strategy is no, so there is no checkpoint to choose from"
        )
    trainer_args.eval_strategy = trainer_args.save_strategy
    trainer_args.eval_steps = trainer_args.save_steps
    trainer_args.load_best_model_at_end = True
    trainer_args.metric_for_best_model = "eval_loss"
    trainer_args.greater_is_better = False
    return [EarlyStoppingCallback(options.patience)] if options.patience else []


def _prompts_of_columns(model: Any, given: Any, columns: Sequence[str]) -> dict[str, str] | None:
    """Return the prompt of each column: those of the model, so that it trains as it encodes.

    Args:
        model: the model in training, which keeps the given prompts.
        given: trainer argument ``prompts``: the prompts of the roles query and document, or None.
        columns: names of the columns; the first holds queries.
    """
    if given:
        if not isinstance(given, dict) or not set(given) <= set(ROLES):
            raise ValueError(
                f"prompts: {given!r}, expected those of the roles, "
                '{"query": "...", "document": "..."}, with which the model is saved'
            )
        model.prompts.update(given)
    query, *passages = columns
    prompts = {query: model.prompts.get("query") or ""}
    prompts |= dict.fromkeys(passages, model.prompts.get("document") or "")
    return prompts if any(prompts.values()) else None


def distill(
    options: DistillOptions, trainer_args: MultiVectorEncoderTrainingArguments
) -> MultiVectorEncoderTrainer:
    """Configure distillation on parallel sentences by optimal transport or another objective.

    Optimal transport is that of OPTICAL (arXiv 2301.12566). The student starts from the teacher
    unless the options name another model.
    """
    options.validate()
    if trainer_args.prompts:
        raise ValueError(
            "prompts: given, but bitext is read with the models' prompts; save the student with its"
        )
    callbacks = _evaluate(options, trainer_args)
    dataset = _training_bitext(options, trainer_args)
    validation = [
        join_pairs(read_bitext_pairs(path), options.join_characters) for path in options.validation
    ]
    set_seed(trainer_args.seed)
    teacher_model = load_retriever(options.teacher)
    dimension = options.dimension or teacher_model.get_embedding_dimension()
    limits = teacher_model[0]
    student = load_retriever(
        options.student or options.teacher,
        dimension=dimension,
        query_expansion=bool(getattr(limits, "query_expansion", None)),
        # A student made from a plain encoder gets the length limits of its teacher.
        default_lengths=(
            getattr(limits, "query_length", None) or DEFAULT_LENGTHS[0],
            getattr(limits, "document_length", None) or DEFAULT_LENGTHS[1],
        ),
    )
    set_partners(student, fingerprints(teacher_model).values())
    set_dropout(student, options.dropout)
    max_length = trainer_args.max_length
    if isinstance(max_length, dict):
        max_length = max_length.get(options.role)
    vectors = None
    if options.teacher_vectors:
        vectors = StoredVectors(
            options.teacher_vectors, role=options.role, max_length=max_length, model=teacher_model
        )
    restrict_embeddings(student, options.embeddings, trainer_args, dataset, options.role)
    if options.objective == "contrastive":
        # A sentence that occurs twice in a batch would be its own negative.
        trainer_args.batch_sampler = BatchSamplers.NO_DUPLICATES
    elif options.group_by_length:
        trainer_args.batch_sampler = LengthBatchSampler
    return MultiVectorEncoderTrainer(
        model=student,
        args=trainer_args,
        train_dataset=dataset,
        eval_dataset=_bitext_dataset(options, validation, trainer_args) if validation else None,
        callbacks=callbacks,
        loss=_distillation_loss(options, student, teacher_model, dataset),
        data_collator=BitextCollator(
            student, teacher_model, role=options.role, max_length=max_length, vectors=vectors
        ),
    )


def _training_bitext(
    options: DistillOptions, trainer_args: MultiVectorEncoderTrainingArguments
) -> Any:
    """Return the bitext of the training as a dataset, or a stream of it."""
    if options.stream:
        if trainer_args.max_steps < 1:
            raise ValueError("max_steps: none given, and a stream has no end; expected 1 or more")
        # Every process reads the stream and takes its share: a batch holds more than tensors, so
        # the main process cannot dispatch it.
        accelerator_config: Any = trainer_args.accelerator_config
        accelerator_config.dispatch_batches = False
        return stream_bitext(options.bitext, seed=trainer_args.seed)
    files = [
        join_pairs(read_bitext_pairs(path)[: options.max_pairs], options.join_characters)
        for path in options.bitext
    ]
    if options.balance:
        files = balance_bitexts(files)
    return _bitext_dataset(options, files, trainer_args)


def _bitext_dataset(
    options: DistillOptions,
    files: Sequence[Sequence[tuple[str, str]]],
    trainer_args: MultiVectorEncoderTrainingArguments,
) -> Any:
    """Return the parallel sentences as a dataset with the columns that the student encodes."""
    pairs = list(itertools.chain.from_iterable(files))
    dataset = bitext_dataset(pairs)
    if options.reads != "other":
        english = [source for source, _ in pairs]
        if options.lexicon:
            switch = CodeSwitcher(
                _read_lexicons(options.lexicon),
                probability=options.probability,
                seed=trainer_args.seed,
            )
            english = [switch(text, f"{index}") for index, text in enumerate(english)]
        dataset = dataset.add_column("english", english)
    if options.reads == "english":
        dataset = dataset.remove_columns("target")
    return dataset


def _read_lexicons(entries: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Read `language=file` entries; the files of one language are merged into one lexicon."""
    lexicons: dict[str, dict[str, list[str]]] = {}
    for entry in entries:
        language, path = entry.split("=", 1)
        lexicon = lexicons.setdefault(language, {})
        for word, translations in read_lexicon(path).items():
            merged = lexicon.setdefault(word, [])
            merged += [text for text in translations if text not in merged]
    return lexicons


def _distillation_loss(
    options: DistillOptions, student: Any, teacher_model: Any, dataset: Any
) -> DistillationLoss:
    masses: dict[str, Any] = {}
    if options.mass != "uniform" or options.skip_frequent:
        source, *columns = dataset.column_names
        student_texts = [text for column in columns for text in dataset[column]]
        masses["student_mass"] = _token_mass(student, student_texts, options)
        masses["teacher_mass"] = _token_mass(teacher_model, list(dataset[source]), options)
    transport: dict[str, type[OTDistillationLoss | DivergenceDistillationLoss]] = {
        "ot": OTDistillationLoss,
        "divergence": DivergenceDistillationLoss,
    }
    if options.objective in transport:
        return transport[options.objective](
            student,
            teacher_model,
            epsilon=options.epsilon,
            max_iter=options.max_iter,
            tol=options.tol,
            gradient=options.gradient,
            rho=options.rho,
            backend=options.backend,
            **masses,
        )
    if options.objective == "contrastive":
        return objectives.ContrastiveBitextLoss(
            student, teacher_model, temperature=options.temperature, **masses
        )
    losses: dict[str, type[DistillationLoss]] = {
        "position": objectives.PositionDistillationLoss,
        "pooled": objectives.PooledDistillationLoss,
        "greedy": objectives.GreedyDistillationLoss,
    }
    return losses[options.objective](student, teacher_model, **masses)


def _token_mass(model: Any, texts: Sequence[str], options: DistillOptions) -> torch.Tensor:
    """Return the mass of each token id of a model's tokenizer.

    The idf of a token that occurs in n of N texts is log((N + 1) / (n + 1)), so tokens that occur
    in every text, such as the special tokens, have no mass.
    """
    tokenizer = model.tokenizer
    counts = token_counts(tokenizer, texts, per_text=True, special_tokens=True)
    size = max(len(tokenizer), max(counts) + 1)
    frequency = torch.zeros(size)
    frequency[list(counts)] = torch.tensor([float(count) for count in counts.values()])
    mass = torch.ones(size)
    if options.mass == "idf":
        # Exactly zero for tokens of every text, despite rounding.
        mass = ((len(texts) + 1) / (frequency + 1)).log().where(frequency < len(texts), 0.0)
    if options.skip_frequent:
        # Ties are broken by token id. The special tokens are the most frequent ones.
        mass[(-frequency).argsort(stable=True)[: options.skip_frequent]] = 0.0
    return mass
