"""Options of the training recipes, shared by `optical train` and the arms of a study."""

# ruff: noqa: RUF009  (_option and _list_option return a new dataclasses.field)

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

Role = Literal["query", "document"]
# As `optical.ot.functional.Gradient`, whose module imports PyTorch.
Gradient = Literal["envelope", "implicit", "unroll"]
Objective = Literal["ot", "divergence", "position", "pooled", "greedy", "contrastive"]
Embeddings = Literal["auto", "all", "occurring", "none"]

# Recipes that compute a model without training steps. Of the trainer's arguments they use
# output_dir alone.
WITHOUT_STEPS = ("transfer", "average")
# Changes to the trainer's default arguments, shared by the command line and studies.
TRAINER_DEFAULTS: dict[str, Any] = {
    "report_to": "none",
    "learning_rate": 2e-5,
    "per_device_train_batch_size": 64,
    "warmup_steps": 0.05,
    "logging_steps": 50,
    "save_steps": 500,
    "save_total_limit": 1,
}
LARGEST_VOCABULARY = 10_000_000
# Default of a required option; validate() reports an option that still has it.
REQUIRED: Any = ""
# Help texts of options that several recipes have.
_EMBEDDINGS = (
    "Input vectors to train: all; those of subwords that occur in the training texts, which gives "
    "the same model without weight decay (occurring); or none. auto is occurring if that changes "
    "no result and leaves out half of them or more, else all."
)
_DROPOUT = (
    "Probability of dropout in training, in all places of the model (default: that of its "
    "configuration)."
)
_VALIDATION = (
    "Files like those of the training. Their loss is computed every save_steps steps, and the "
    "checkpoint with the lowest one becomes the trained model."
)
_PATIENCE = "Stop after this many evaluations without a lower validation loss; 0 never stops."


def _option(default: Any, help_text: str) -> Any:
    """Declare a dataclass field with its default and its help text on the command line."""
    return field(default=default, metadata={"help": help_text})


def _list_option(help_text: str) -> Any:
    return field(default_factory=list, metadata={"help": help_text})


@dataclass
class EncoderOptions:
    """Options of `optical train encoder`."""

    text: list[str] = _list_option(
        "Plain-text files with one sentence per line, or JSON lines with the key `text`."
    )
    bitext: list[str] = _list_option(
        "Files of parallel sentences, `English TAB other`. Both sentences of a pair are read as "
        "one text."
    )
    vocabulary_size: int = _option(20_000, "Number of WordPiece units to learn.")
    hidden_size: int = _option(128, "Width of the encoder and of its token vectors.")
    layers: int = _option(2, "Number of transformer layers.")
    heads: int = _option(2, "Number of attention heads.")
    max_tokens: int = _option(128, "Maximum length of a training text in tokens.")
    mask_probability: float = _option(0.15, "Probability that a token is masked.")
    resume: bool = _option(False, "Continue from the last checkpoint in output_dir.")

    def validate(self) -> None:
        """Raise ValueError for invalid options. No file is read."""
        if not self.text and not self.bitext:
            raise ValueError("text, bitext: no file given, expected at least one")
        _check_vocabulary_size(self.vocabulary_size)
        for name in ("hidden_size", "layers", "heads"):
            _check_positive(name, getattr(self, name))
        if self.max_tokens < 3:
            raise ValueError(f"max_tokens: {self.max_tokens}, expected 3 or more")
        if not 0.0 < self.mask_probability < 1.0:
            raise ValueError(
                f"mask_probability: {self.mask_probability}, expected a number between 0 and 1"
            )
        if self.hidden_size % self.heads:
            raise ValueError(
                f"heads: {self.heads}, expected a divisor of hidden_size {self.hidden_size}"
            )


@dataclass
class TeacherOptions:
    """Options of `optical train teacher`."""

    model: str = _option(
        REQUIRED, "Encoder to start from: a Hugging Face name or a folder. Required."
    )
    pairs: list[str] = _list_option(
        "Files of training pairs: TSV `query TAB passage`, or JSON lines with the keys query, pos "
        "and neg."
    )
    queries: str = _option("", "TSV file `query id TAB passage id TAB query`. Requires --passages.")
    passages: str = _option(
        "", "JSON lines or TSV file of passage ids and texts. Requires --queries."
    )
    dimension: int | None = _option(
        None, "Dimension of the token vectors (default: the width of the encoder)."
    )
    query_length: int | None = _option(
        None,
        "Maximum length of a query in tokens (default: 32, or the positions of the encoder if they "
        "are fewer).",
    )
    document_length: int | None = _option(
        None,
        "Maximum length of a passage in tokens (default: 180, or the positions of the encoder if "
        "they are fewer).",
    )
    query_expansion: bool = _option(False, "Pad queries to query_length with mask tokens.")
    skip_frequent: int = _option(
        0, "Exclude the N most frequent tokens of the training texts from the scores of queries."
    )
    center: bool = _option(
        False,
        "Subtract the mean token vector of the training passages, which makes the vectors of a "
        "pre-trained encoder less alike.",
    )
    scale: float = _option(1.0, "Factor on the MaxSim scores before the softmax.")
    embeddings: Embeddings = _option("auto", _EMBEDDINGS)
    dropout: float | None = _option(None, _DROPOUT)
    validation: list[str] = _list_option(_VALIDATION)
    patience: int = _option(0, _PATIENCE)
    resume: bool = _option(False, "Continue from the last checkpoint in output_dir.")

    def validate(self) -> None:
        """Raise ValueError for invalid options. No file is read."""
        _check_required("model", self.model)
        _check_choices(self)
        if bool(self.queries) != bool(self.passages):
            raise ValueError("queries, passages: only one is given, expected both or neither")
        if not self.pairs and not self.queries:
            raise ValueError("pairs: none given; expected --pairs, or --queries with --passages")
        _check_patience(self)
        _check_dropout(self.dropout)
        for name in ("dimension", "query_length", "document_length"):
            _check_positive(name, getattr(self, name))
        if self.skip_frequent < 0:
            raise ValueError(f"skip_frequent: {self.skip_frequent}, expected 0 or more")
        if not 0.0 < self.scale < float("inf"):
            raise ValueError(f"scale: {self.scale}, expected a number > 0")


@dataclass
class CodeswitchOptions(TeacherOptions):
    """Options of `optical train codeswitch`."""

    lexicon: list[str] = _list_option(
        "Bilingual lexicons as `language=file`. A file has the lines `English TAB foreign`."
    )
    probability: float = _option(0.5, "Probability that a word is replaced by a translation.")
    role: Literal["query", "document", "both"] = _option(
        "document", "Texts to code-switch: query, document or both."
    )
    copies: int = _option(
        1, "Number of code-switched copies of each training pair, drawn independently."
    )

    def validate(self) -> None:
        """Raise ValueError for invalid options. No file is read."""
        super().validate()
        if not self.lexicon:
            raise ValueError("lexicon: none given; expected at least one `language=file`")
        _check_code_switching(self.lexicon, self.probability)
        _check_positive("copies", self.copies)


@dataclass
class DistillOptions:
    """Options of `optical train distill`."""

    teacher: str = _option(
        REQUIRED, "Frozen English retriever: a Hugging Face name or a folder. Required."
    )
    student: str = _option("", "Model that the student starts from (default: the teacher).")
    bitext: list[str] = _list_option(
        "One or more files of parallel sentences, `English TAB other`. Required."
    )
    role: Role = _option(
        REQUIRED, "Texts that the student encodes in retrieval: query or document. Required."
    )
    objective: Objective = _option(
        "ot",
        "Loss between the token vectors of two parallel sentences: "
        + ", ".join(get_args(Objective))
        + ".",
    )
    epsilon: float = _option(0.05, "Entropic regularisation of the transport plan.")
    max_iter: int = _option(50, "Maximum number of Sinkhorn iterations.")
    tol: float = _option(
        0.0, "L1 error of the marginals at which a pair stops iterating (0: run max_iter)."
    )
    gradient: Gradient = _option(
        "envelope", "Gradient of the transport cost: envelope (as OPTICAL), implicit or unroll."
    )
    rho: float | None = _option(
        None, "Penalty on marginal deviations (default: both marginals are constraints)."
    )
    backend: str = _option("auto", "Sinkhorn backend; `optical info` lists the available ones.")
    temperature: float = _option(0.05, "Softmax temperature of the contrastive objective.")
    mass: Literal["uniform", "idf"] = _option(
        "uniform", "Mass of a token: uniform, or its idf in the bitext."
    )
    skip_frequent: int = _option(
        0, "Give no mass to the N most frequent tokens of each language of the bitext."
    )
    reads: Literal["other", "english", "both"] = _option(
        "other", "Sentences of a pair that the student encodes: other, english or both."
    )
    lexicon: list[str] = _list_option(
        "Bilingual lexicons as `language=file`. They code-switch the English that the student "
        "encodes."
    )
    probability: float = _option(0.5, "Probability that a word is replaced by a translation.")
    teacher_vectors: list[str] = _list_option(
        "Token stores of the teacher, one folder per file of bitext and validation, as written by "
        "`optical vectors`."
    )
    max_pairs: int | None = _option(
        None, "Maximum number of pairs read from each file (default: all)."
    )
    join_characters: int = _option(
        0,
        "Join neighbouring sentence pairs of a file into passages of up to N characters, as long "
        "as documents (0: single sentences).",
    )
    balance: bool = _option(
        False, "Repeat the pairs of smaller files so that all files have equal weight."
    )
    group_by_length: bool = _option(
        False, "Put sentences of similar length into a batch, which saves computing padding."
    )
    stream: bool = _option(
        False, "Read the bitext from disk during training instead of holding it in memory."
    )
    dimension: int | None = _option(
        None, "Dimension of the token vectors of a new student (default: that of the teacher)."
    )
    embeddings: Embeddings = _option("auto", _EMBEDDINGS)
    dropout: float | None = _option(None, _DROPOUT)
    validation: list[str] = _list_option(_VALIDATION)
    patience: int = _option(0, _PATIENCE)
    resume: bool = _option(False, "Continue from the last checkpoint in output_dir.")

    def validate(self) -> None:
        """Raise ValueError or TypeError for invalid options. No file is read."""
        _check_required("teacher", self.teacher)
        _check_choices(self)
        if self.lexicon and self.reads == "other":
            raise ValueError("lexicon: given, but the student reads no English; set reads to both")
        _check_code_switching(self.lexicon, self.probability)
        for name in ("skip_frequent", "join_characters"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}, expected 0 or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature}, expected a number > 0")
        if not self.bitext:
            raise ValueError("bitext: none given; expected at least one file")
        files = len(self.bitext) + len(self.validation)
        if self.teacher_vectors and len(self.teacher_vectors) != files:
            raise ValueError(
                f"teacher_vectors: {len(self.teacher_vectors)} folders for {files} files of bitext "
                "and validation; expected one folder per file"
            )
        _check_patience(self)
        _check_dropout(self.dropout)
        _check_positive("max_pairs", self.max_pairs)
        _check_positive("dimension", self.dimension)
        if self.group_by_length and self.objective == "contrastive":
            raise ValueError(
                "group_by_length: given, but the objective 'contrastive' needs batches without "
                "repeated sentences"
            )
        if self.stream:
            self._check_streamable()
        from optical.ot.checks import check_options

        check_options(
            "distill",
            epsilon=self.epsilon,
            max_iter=self.max_iter,
            tol=self.tol,
            gradient=self.gradient,
            rho=self.rho,
            backend=self.backend,
        )

    def _check_streamable(self) -> None:
        """Refuse options that need the whole bitext before the first step."""
        required: dict[str, Any] = {"mass": "uniform", "skip_frequent": 0, "reads": "other"}
        required |= {"max_pairs": None, "join_characters": 0, "group_by_length": False}
        for name, value in required.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}: {getattr(self, name)!r}, expected {value!r}, because stream reads "
                    "the bitext only once"
                )
        if self.objective == "contrastive":
            raise ValueError(
                "objective: 'contrastive' needs batches without repeated sentences, which stream "
                "cannot guarantee"
            )


@dataclass
class TransferOptions:
    """Options of `optical train transfer`."""

    model: str = _option(REQUIRED, "English retriever: a Hugging Face name or a folder. Required.")
    text: list[str] = _list_option(
        "Text files of all languages with one sentence per line, or JSON lines with the key `text`."
    )
    bitext: list[str] = _list_option(
        "One or more files of parallel sentences, `English TAB other`."
    )
    vocabulary_size: int = _option(
        40_000, "Number of units to learn; 0, with keep, leaves the vocabulary as it is."
    )
    keep: bool = _option(
        False, "Keep the units of the retriever and learn only units of the other languages."
    )
    balance: bool = _option(
        False, "Repeat the pairs of smaller files when the vocabulary is learnt."
    )
    initialize_from: Literal["bitext", "spelling"] = _option(
        "bitext",
        "Source of the input vectors of new units: bitext (and spelling), or spelling alone.",
    )
    prior: float = _option(
        0.0,
        "Least weight of a kept unit's own input vector, in occurrences of the unit in the pairs. "
        "Large values keep the vectors of a multilingual retriever.",
    )
    max_pairs: int | None = _option(
        None, "Maximum number of pairs read from each file (default: all)."
    )

    def validate(self) -> None:
        """Raise ValueError for invalid options. No file is read."""
        _check_required("model", self.model)
        if not self.text and not self.bitext:
            raise ValueError("text, bitext: no file given, expected at least one")
        _check_choices(self)
        _check_vocabulary_size(self.vocabulary_size, least=0 if self.keep else 1)
        if not 0.0 <= self.prior < float("inf"):
            raise ValueError(f"prior: {self.prior}, expected a number of at least 0")
        _check_positive("max_pairs", self.max_pairs)


@dataclass
class AverageOptions:
    """Options of `optical train average`."""

    models: list[str] = _list_option(
        "Two or more students fine-tuned from one model: Hugging Face names or folders. Required."
    )

    def validate(self) -> None:
        """Raise ValueError for invalid options. No file is read."""
        if len(self.models) < 2:
            raise ValueError(f"models: {len(self.models)} given, expected two or more")


def choices_of(options_class: type[Any]) -> dict[str, tuple[str, ...]]:
    """Return the accepted values of each option that has a fixed set of values."""
    hints = get_type_hints(options_class)
    return {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}


def default_of(entry: dataclasses.Field[Any]) -> Any:
    """Return the default of a field of an options class."""
    factory = entry.default_factory
    return entry.default if factory is dataclasses.MISSING else factory()


def _check_choices(options: Any) -> None:
    for name, accepted in choices_of(type(options)).items():
        value = getattr(options, name)
        if value not in accepted:
            raise ValueError(f"{name}: {value!r}, expected {' or '.join(accepted)}")


def _check_code_switching(lexicon: list[str], probability: float) -> None:
    for entry in lexicon:
        if "=" not in entry:
            raise ValueError(f"lexicon: {entry!r}, expected `language=file`")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability: {probability}, expected a number from 0 to 1")


def _check_dropout(probability: float | None) -> None:
    if probability is not None and not 0.0 <= probability < 1.0:
        raise ValueError(f"dropout: {probability}, expected a number from 0 to below 1")


def _check_positive(name: str, value: int | None) -> None:
    # Libraries hold such numbers in 32 bits.
    if value is not None and not 1 <= value < 2**31:
        limit = "1 or more" if value < 1 else f"{2**31 - 1} or less"
        raise ValueError(f"{name}: {value}, expected {limit}")


def _check_vocabulary_size(value: int, least: int = 1) -> None:
    # The tokenizers library reserves memory for all units, and aborts the process if it cannot.
    if not least <= value <= LARGEST_VOCABULARY:
        limit = f"{least} or more" if value < least else f"{LARGEST_VOCABULARY} or less"
        raise ValueError(f"vocabulary_size: {value}, expected {limit}")


def _check_patience(options: Any) -> None:
    if options.patience < 0:
        raise ValueError(f"patience: {options.patience}, expected 0 or more")
    if options.patience and not options.validation:
        raise ValueError("patience: given without validation, whose loss it watches")


def _check_required(name: str, value: str) -> None:
    if not value:
        raise ValueError(f"{name}: none given; expected a Hugging Face name or a folder")
