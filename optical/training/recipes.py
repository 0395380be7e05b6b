"""The training recipes: each one a configured Sentence Transformers trainer.

teacher     English late interaction from (query, passage) pairs, in-batch softmax   (recipe R0)
distill     a student pulled onto a frozen teacher through parallel sentences   (recipes R1 to R4)
codeswitch  the teacher recipe on text whose words were replaced through lexicons    (recipe R5)
transfer    a retriever whose vocabulary becomes that of other languages (``optical.training.vocabulary_transfer``)
average     the mean of students that began alike (``optical.training.recipes``)

Each function returns the trainer, which its caller may change before ``run`` trains, resumes and
saves. There is no training loop here: checkpoints, precision, seeds, progress bars, many GPUs and
model cards are the trainer's.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

import torch
from datasets import Dataset
from sentence_transformers import (
    MultiVectorEncoder,
    MultiVectorEncoderTrainer,
    MultiVectorEncoderTrainingArguments,
)
from sentence_transformers.base.sampler import BatchSamplers
from sentence_transformers.multi_vector_encoder.data_collator import MultiVectorEncoderDataCollator
from sentence_transformers.multi_vector_encoder.losses import (
    MultiVectorMultipleNegativesRankingLoss,
)
from transformers import AutoTokenizer, set_seed

from optical.data.lexicon import CodeSwitcher, read_lexicon
from optical.data.pairs import (
    balance_bitexts,
    bitext_dataset,
    read_bitext_pairs,
    read_training_pairs,
    stream_bitext,
)
from optical.io.settings import nearest, typed
from optical.losses import objectives
from optical.losses.distillation import DistillationLoss, OTDistillationLoss
from optical.models.encoding import ROLES
from optical.models.retriever import load_retriever, resolve_model
from optical.models.token_store import StoredVectors
from optical.models.tokenizers import frequent_tokens, token_counts
from optical.training.options import (
    AverageOptions,
    CodeswitchOptions,
    DistillOptions,
    TeacherOptions,
)
from optical.training.runner import Finished

logger = logging.getLogger("optical")


class BitextCollator(MultiVectorEncoderDataCollator):
    """Tokenise parallel sentences: the first column for the teacher, the others for the student.

    Args:
        student, teacher: two ``MultiVectorEncoder`` models, or dense ``SentenceTransformer`` ones.
        role: "query" or "document", the side of retrieval that the student will serve; it decides
            prompts, lengths and mask-token expansion on both sides.
        max_length: longest sentence in tokens (None: the models' own limits).
        vectors: the teacher's vectors of the first column where they are stored, which spares
            running it; None tokenises the column for the teacher.
    """

    def __init__(
        self,
        student: MultiVectorEncoder,
        teacher: MultiVectorEncoder,
        *,
        role: str,
        max_length: int | None = None,
        vectors: StoredVectors | None = None,
    ) -> None:
        if role not in ROLES:
            raise ValueError(f"role: {role!r}, expected 'query' or 'document'")
        super().__init__(preprocess_fn=student.preprocess, max_length=max_length)
        self.student = student
        self.teacher = teacher
        self.role = role
        self.vectors = vectors

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the tensors of a batch, keyed ``{column}_{name}`` as the trainer expects."""
        batch: dict[str, Any] = {}
        limit = {} if self.max_length is None else {"max_length": self.max_length}
        columns = [name for name in features[0] if name != "dataset_name"]
        if "dataset_name" in features[0]:
            batch["dataset_name"] = features[0]["dataset_name"]
        for position, column in enumerate(columns):
            model = self.student if position else self.teacher
            texts = [row[column] for row in features]
            if self.vectors is not None and not position:
                tokens = self.vectors.batch(texts)
            else:
                tokens = model.preprocess(
                    texts, prompt=model.prompts.get(self.role), task=self.role, **limit
                )
            batch.update({f"{column}_{name}": value for name, value in tokens.items()})
            batch[f"{column}_task"] = self.role
        return batch


@dataclass
class CommandLineArguments(MultiVectorEncoderTrainingArguments):
    """The trainer's arguments in a form that a command line can hold."""

    # A number, or the limits of both roles in JSON; argparse has no type for "either".
    max_length: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": 'Longest text in training: 32, or \'{"query": 32, "document": 64}\'.'},
    )

    def __post_init__(self) -> None:
        if isinstance(self.max_length, str) and self.max_length.isdigit():
            self.max_length = int(self.max_length)  # type: ignore[assignment]
        super().__post_init__()  # type: ignore[no-untyped-call]


def arguments(output_dir: str | Path, **changes: Any) -> MultiVectorEncoderTrainingArguments:
    """Training arguments with this project's defaults: quiet, resumable, nothing sent anywhere.

    Raises:
        ValueError: an argument is unknown, or its value of another type; the trainer would say so
            after minutes, and without the argument's name.
    """
    hints = get_type_hints(MultiVectorEncoderTrainingArguments)
    for name, value in changes.items():
        if name not in hints:
            raise ValueError(f"trainer's argument {name!r} is unknown{nearest(name, hints)}")
        typed(value, hints[name], name)
    return MultiVectorEncoderTrainingArguments(
        output_dir=str(output_dir), **{**ARGUMENT_DEFAULTS, **changes}
    )


# What the recipes change of the trainer's defaults; the command line and the study share them.
ARGUMENT_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 64,
    "warmup_steps": 0.05,
    "logging_steps": 50,
    "save_steps": 500,
    "save_total_limit": 1,
}


def teacher(
    options: TeacherOptions, args: MultiVectorEncoderTrainingArguments
) -> MultiVectorEncoderTrainer:
    """Configure training on (query, passage) pairs: softmax over the passages of a batch.

    The passages of the other queries in a batch are its negatives (explicit negatives join them);
    no passage stands twice in a batch. Source: Khattab and Zaharia, ColBERT (SIGIR 2020).
    """
    options.validate()
    return _contrastive(
        options, args, read_training_pairs(options.pairs, options.queries, options.passages)
    )


def codeswitch(
    options: CodeswitchOptions, args: MultiVectorEncoderTrainingArguments
) -> MultiVectorEncoderTrainer:
    """Configure the teacher recipe on code-switched text (Litschko et al., arXiv 2305.05295).

    One lexicon gives their bilingual variant, several the multilingual one. The side that stays
    English is left untouched.
    """
    options.validate()
    rows = read_training_pairs(options.pairs, options.queries, options.passages)
    lexicons = _lexicons(options.lexicon)
    switch = CodeSwitcher(lexicons, probability=options.probability, seed=args.seed)
    coverage = switch.coverage([row[-1] for row in rows[:2000]])
    logger.info("code switching: the lexicons know %.0f %% of the words", 100 * coverage)
    switched = []
    for copy in range(options.copies):
        for index, (query, *passages) in enumerate(rows):
            key = f"{copy}:{index}"
            if options.sides != "document":
                query = switch(query, f"{key}:query")
            if options.sides != "query":
                passages = [switch(text, f"{key}:{i}") for i, text in enumerate(passages)]
            switched.append((query, *passages))
    return _contrastive(options, args, switched)


def distill(
    options: DistillOptions, args: MultiVectorEncoderTrainingArguments
) -> MultiVectorEncoderTrainer:
    """Configure distillation on parallel sentences: OT (OPTICAL, arXiv 2301.12566) or another.

    The student starts from the teacher unless the options name another model.
    """
    options.validate()
    dataset = _bitext(options, args)
    set_seed(args.seed)
    taught_by = load_retriever(options.teacher)
    size = options.dimension or taught_by.get_embedding_dimension()
    # A student made of a plain encoder reads as much as its teacher does.
    reader = taught_by[0]
    student = load_retriever(
        options.student or options.teacher,
        dimension=size,
        query_length=getattr(reader, "query_length", None) or 32,
        document_length=getattr(reader, "document_length", None) or 180,
        query_expansion=bool(getattr(reader, "query_expansion", None)),
    )
    limit = args.max_length
    if isinstance(limit, dict):
        limit = limit.get(options.role)
    stored = None
    if options.teacher_vectors:
        stored = StoredVectors(options.teacher_vectors, role=options.role, max_length=limit)
    if options.objective == "contrastive":
        # A sentence that stands twice in a batch would be its own negative.
        args.batch_sampler = BatchSamplers.NO_DUPLICATES
    return MultiVectorEncoderTrainer(
        model=student,
        args=args,
        train_dataset=dataset,
        loss=_objective(options, student, taught_by, dataset),
        data_collator=BitextCollator(
            student, taught_by, role=options.role, max_length=limit, vectors=stored
        ),
    )


def _bitext(options: DistillOptions, args: MultiVectorEncoderTrainingArguments) -> Any:
    """The parallel sentences as a dataset, with the columns that the student is to read."""
    if options.stream:
        if args.max_steps < 1:
            raise ValueError("max_steps: none given, and a stream has no end; expected 1 or more")
        # Each process reads the stream and takes its turns; batches hold more than tensors.
        loading: Any = args.accelerator_config
        loading.dispatch_batches = False
        return stream_bitext(options.bitext, seed=args.seed)
    files = [read_bitext_pairs(path)[: options.max_pairs] for path in options.bitext]
    if options.balance:
        files = balance_bitexts(files)
    pairs = list(itertools.chain.from_iterable(files))
    dataset = bitext_dataset(pairs)
    if options.reads != "other":
        english = [source for source, _ in pairs]
        if options.lexicon:
            switch = CodeSwitcher(
                _lexicons(options.lexicon), probability=options.probability, seed=args.seed
            )
            english = [switch(text, f"{index}") for index, text in enumerate(english)]
        dataset = dataset.add_column("english", english)
    if options.reads == "english":
        dataset = dataset.remove_columns("target")
    return dataset


def _lexicons(entries: Sequence[str]) -> dict[str, dict[str, list[str]]]:
    """Read `language=file` entries; several files of a language are one lexicon."""
    lexicons: dict[str, dict[str, list[str]]] = {}
    for entry in entries:
        language, path = entry.split("=", 1)
        for word, translations in read_lexicon(path).items():
            known = lexicons.setdefault(language, {}).setdefault(word, [])
            known += [one for one in translations if one not in known]
    return lexicons


def _objective(
    options: DistillOptions, student: Any, taught_by: Any, dataset: Any
) -> DistillationLoss:
    masses: dict[str, Any] = {}
    if options.mass != "uniform" or options.skip_frequent:
        source, *columns = dataset.column_names
        read = [text for column in columns for text in dataset[column]]
        masses["student_mass"] = _mass(student, read, options)
        masses["teacher_mass"] = _mass(taught_by, list(dataset[source]), options)
    if options.objective == "ot":
        return OTDistillationLoss(
            student,
            taught_by,
            epsilon=options.epsilon,
            max_iter=options.max_iter,
            tol=options.tol,
            gradient=options.gradient,  # type: ignore[arg-type]
            rho=options.rho,
            backend=options.backend,
            **masses,
        )
    if options.objective == "contrastive":
        return objectives.ContrastiveBitextLoss(
            student, taught_by, temperature=options.temperature, **masses
        )
    kinds: dict[str, type[DistillationLoss]] = {
        "position": objectives.PositionDistillationLoss,
        "pooled": objectives.PooledDistillationLoss,
        "greedy": objectives.GreedyDistillationLoss,
    }
    return kinds[options.objective](student, taught_by, **masses)


def _mass(model: Any, texts: Sequence[str], options: DistillOptions) -> torch.Tensor:
    """Weight of each token of a model's tokenizer.

    idf is log((N + 1) / (n + 1)) for a token in n of the N texts: tokens of every text, such as
    the special ones, weigh nothing.
    """
    tokenizer = model.tokenizer
    counts = token_counts(tokenizer, texts, per_text=True, special_tokens=True)
    size = max(len(tokenizer), max(counts) + 1)
    seen = torch.zeros(size)
    seen[list(counts)] = torch.tensor([float(count) for count in counts.values()])
    mass = torch.ones(size)
    if options.mass == "idf":
        # Rounding must not leave a trace of mass, or less than none, to tokens of every text.
        mass = ((len(texts) + 1) / (seen + 1)).log().where(seen < len(texts), 0.0)
    if options.skip_frequent:
        # Equal counts in the order of the vocabulary; special tokens are the most frequent ones.
        mass[(-seen).argsort(stable=True)[: options.skip_frequent]] = 0.0
    return mass


def _contrastive(
    options: TeacherOptions,
    args: MultiVectorEncoderTrainingArguments,
    rows: list[tuple[str, ...]],
) -> MultiVectorEncoderTrainer:
    set_seed(args.seed)
    frequent: list[str] = []
    if options.skip_frequent:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(options.model))
        texts = [text for row in rows for text in row]
        frequent = frequent_tokens(tokenizer, texts, options.skip_frequent)
    model = load_retriever(
        options.model,
        dimension=options.dimension,
        query_length=options.query_length,
        document_length=options.document_length,
        query_expansion=options.query_expansion,
        skip_words=frequent,
    )
    # A passage twice in a batch would be its own negative.
    args.batch_sampler = BatchSamplers.NO_DUPLICATES
    names = ["query", "positive", *(f"negative_{i}" for i in range(1, len(rows[0]) - 1))]
    columns = [list(column) for column in zip(*rows, strict=True)]
    return MultiVectorEncoderTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict(dict(zip(names, columns, strict=True))),
        loss=MultiVectorMultipleNegativesRankingLoss(model, scale=options.scale),
    )


def average(options: AverageOptions, args: Any) -> Finished:
    """Average the weights of retrievers that differ in nothing else.

    Args:
        options: the retrievers.
        args: training arguments, of which only the folder to write to is read.

    Returns:
        What ``training.run`` saves: the first retriever with the mean of all weights, each in the
        dtype that it has there.

    Raises:
        FileNotFoundError, ValueError: no such model, or one with other units or other weights than
            the first, because it is no student of the same start.
    """
    options.validate()
    first = load_retriever(options.models[0])
    sums = {name: value.double() for name, value in first.state_dict().items()}
    units = first.tokenizer.get_vocab()
    for name in options.models[1:]:
        model = load_retriever(name)
        if model.tokenizer.get_vocab() != units:
            raise ValueError(f"models: {name} has other units than {options.models[0]}")
        weights = model.state_dict()
        for key in sums.keys() | weights.keys():
            shapes = [tuple(one[key].shape) if key in one else None for one in (weights, sums)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"models: {key} of {name} has the shape {shapes[0]}, expected that of "
                    f"{options.models[0]}, {shapes[1]}"
                )
            sums[key] += weights[key]
    # What is copied keeps its dtype, whole numbers included.
    first.load_state_dict({key: total / len(options.models) for key, total in sums.items()})
    return Finished(first, args)
