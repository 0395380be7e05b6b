"""The options of the training recipes: what `optical train` and a study's arms may set."""

from __future__ import annotations

from dataclasses import dataclass, field

from optical.models.encoding import ROLES
from optical.ot.validation import check_options

OBJECTIVES = ("ot", "position", "pooled", "greedy", "contrastive")
MASSES = ("uniform", "idf")
READS = ("other", "english", "both")
VECTORS = ("bitext", "spelling")
# Recipes that take no steps, and so no arguments of them.
AT_ONCE = ("transfer", "average")


@dataclass
class TeacherOptions:
    """Options of `optical train teacher`."""

    model: str = field(
        default="", metadata={"help": "Encoder to start from: Hugging Face name or folder."}
    )
    pairs: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Training pairs: TSV `query TAB passage`, or JSON lines with query, pos, neg."
        },
    )
    queries: str = field(
        default="", metadata={"help": "With --passages: TSV `query id TAB passage id TAB query`."}
    )
    passages: str = field(
        default="", metadata={"help": "With --queries: JSON lines or TSV of passage id and text."}
    )
    dimension: int | None = field(
        default=None, metadata={"help": "Size of the token vectors (default: encoder's width)."}
    )
    query_length: int = field(default=32, metadata={"help": "Longest query in tokens."})
    document_length: int = field(default=180, metadata={"help": "Longest passage in tokens."})
    query_expansion: bool = field(
        default=False, metadata={"help": "Fill queries with mask tokens to query_length."}
    )
    skip_frequent: int = field(
        default=0,
        metadata={
            "help": "Leave the N most frequent tokens of the training texts out of queries' scores."
        },
    )
    scale: float = field(
        default=1.0, metadata={"help": "Factor on the MaxSim scores before the softmax."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Continue from the last checkpoint in output_dir."}
    )

    def validate(self) -> None:
        """Raise ValueError for options that cannot work, before anything is read."""
        _required("model", self.model)
        if bool(self.queries) != bool(self.passages):
            raise ValueError("queries, passages: one of them alone; expected both or neither")
        if not self.pairs and not self.queries:
            raise ValueError("pairs: none given; expected --pairs, or --queries with --passages")


@dataclass
class CodeswitchOptions(TeacherOptions):
    """Options of `optical train codeswitch`."""

    lexicon: list[str] = field(
        default_factory=list,
        metadata={"help": "Lexicons `language=file`, file: `English TAB foreign`."},
    )
    probability: float = field(default=0.5, metadata={"help": "Chance that a word is replaced."})
    sides: str = field(
        default="document", metadata={"help": "Which side is switched: query, document or both."}
    )
    copies: int = field(
        default=1, metadata={"help": "How often each pair is switched, with draws of its own."}
    )

    def validate(self) -> None:
        """Raise ValueError for options that cannot work, before anything is read."""
        super().validate()
        if not self.lexicon:
            raise ValueError("lexicon: none given; expected at least one `language=file`")
        _check_switching(self.lexicon, self.probability)
        if self.sides not in (*ROLES, "both"):
            raise ValueError(f"sides: {self.sides!r}, expected 'query', 'document' or 'both'")
        if self.copies < 1:
            raise ValueError(f"copies: {self.copies}, expected 1 or more")


@dataclass
class DistillOptions:
    """Options of `optical train distill`."""

    teacher: str = field(
        default="", metadata={"help": "The frozen English retriever: Hugging Face name or folder."}
    )
    student: str = field(
        default="", metadata={"help": "Model to start the student from (default: the teacher)."}
    )
    bitext: list[str] = field(
        default_factory=list,
        metadata={"help": "Parallel sentences `English TAB other`, one file or more."},
    )
    role: str = field(
        default="", metadata={"help": "What the student will read: query or document."}
    )
    objective: str = field(
        default="ot",
        metadata={"help": "How two sentences are compared: " + ", ".join(OBJECTIVES) + "."},
    )
    epsilon: float = field(default=0.05, metadata={"help": "Temperature of the transport plan."})
    max_iter: int = field(default=50, metadata={"help": "Sinkhorn iterations."})
    tol: float = field(
        default=0.0, metadata={"help": "Stop a pair at this L1 marginal error (0: run max_iter)."}
    )
    gradient: str = field(
        default="envelope", metadata={"help": "envelope (OPTICAL), implicit or unroll."}
    )
    rho: float | None = field(
        default=None, metadata={"help": "Penalty of moved mass (default: both marginals fixed)."}
    )
    backend: str = field(default="auto", metadata={"help": "Sinkhorn backend; see `optical info`."})
    temperature: float = field(
        default=0.05, metadata={"help": "Of the contrastive objective's softmax."}
    )
    mass: str = field(
        default="uniform", metadata={"help": "Weight of a token: uniform, or idf in the bitext."}
    )
    skip_frequent: int = field(
        default=0, metadata={"help": "Leave out the N most frequent tokens of either side."}
    )
    reads: str = field(
        default="other",
        metadata={"help": "Which sides the student learns to read: other, english or both."},
    )
    lexicon: list[str] = field(
        default_factory=list,
        metadata={"help": "Lexicons `language=file` that switch the English that it reads."},
    )
    probability: float = field(default=0.5, metadata={"help": "Chance that a word is switched."})
    teacher_vectors: list[str] = field(
        default_factory=list,
        metadata={"help": "Stored vectors of the teacher, a folder for each file of bitext."},
    )
    max_pairs: int | None = field(
        default=None, metadata={"help": "Use the first so many pairs of each file."}
    )
    balance: bool = field(
        default=False,
        metadata={"help": "Repeat the pairs of smaller files, so that all files weigh alike."},
    )
    stream: bool = field(
        default=False,
        metadata={"help": "Read the bitext from disk while training, whatever its size."},
    )
    dimension: int | None = field(
        default=None, metadata={"help": "Size of a new student's vectors (default: teacher's)."}
    )
    resume: bool = field(
        default=False, metadata={"help": "Continue from the last checkpoint in output_dir."}
    )

    def validate(self) -> None:
        """Raise ValueError for options that cannot work, before anything is read."""
        _required("teacher", self.teacher)
        if self.role not in ROLES:
            raise ValueError(f"role: {self.role!r}, expected 'query' or 'document'")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective: {self.objective!r}, expected {' or '.join(OBJECTIVES)}")
        if self.mass not in MASSES:
            raise ValueError(f"mass: {self.mass!r}, expected {' or '.join(MASSES)}")
        if self.reads not in READS:
            raise ValueError(f"reads: {self.reads!r}, expected {' or '.join(READS)}")
        if self.lexicon and self.reads == "other":
            raise ValueError("lexicon: given, but the student reads no English; set reads to both")
        _check_switching(self.lexicon, self.probability)
        if self.skip_frequent < 0:
            raise ValueError(f"skip_frequent: {self.skip_frequent}, expected 0 or more")
        if not self.temperature > 0:
            raise ValueError(f"temperature: {self.temperature}, expected a number > 0")
        if not self.bitext:
            raise ValueError("bitext: none given; expected at least one file")
        if self.teacher_vectors and len(self.teacher_vectors) != len(self.bitext):
            raise ValueError(
                f"teacher_vectors: {len(self.teacher_vectors)} folders for {len(self.bitext)} "
                "files of bitext; expected one for each"
            )
        _some_pairs(self.max_pairs)
        if self.stream:
            # These look at the whole bitext before the first step.
            for name, usual in (("mass", "uniform"), ("skip_frequent", 0), ("reads", "other"),
                                ("max_pairs", None)):  # fmt: skip
                if getattr(self, name) != usual:
                    raise ValueError(f"{name}: {getattr(self, name)!r}, expected {usual!r}, "
                                     "because stream reads the bitext only once")  # fmt: skip
            if self.objective == "contrastive":
                raise ValueError("objective: 'contrastive' needs batches without repetitions, "
                                 "which stream cannot promise")  # fmt: skip
        check_options(
            epsilon=self.epsilon,
            max_iter=self.max_iter,
            tol=self.tol,
            gradient=self.gradient,
            rho=self.rho,
            backend=self.backend,
        )


@dataclass
class TransferOptions:
    """Options of `optical train transfer`."""

    model: str = field(
        default="", metadata={"help": "The English retriever: Hugging Face name or folder."}
    )
    text: list[str] = field(
        default_factory=list,
        metadata={"help": "Text of all languages (a sentence a line, or JSON lines with `text`)."},
    )
    bitext: list[str] = field(
        default_factory=list,
        metadata={"help": "Parallel sentences `English TAB other`, one file or more."},
    )
    vocabulary_size: int = field(default=40_000, metadata={"help": "WordPiece units to learn."})
    keep: bool = field(
        default=False,
        metadata={"help": "Keep the retriever's own units, and learn those of the others alone."},
    )
    balance: bool = field(
        default=False,
        metadata={"help": "Repeat the pairs of smaller files when units are learnt."},
    )
    vectors: str = field(
        default="bitext",
        metadata={"help": "What units start from: bitext, or their spelling alone."},
    )
    max_pairs: int | None = field(
        default=None, metadata={"help": "Read the first so many pairs of each file alone."}
    )

    def validate(self) -> None:
        """Raise ValueError for options that cannot work, before anything is read."""
        _required("model", self.model)
        if not self.text and not self.bitext:
            raise ValueError("text, bitext: no file given, expected at least one")
        if self.vectors not in VECTORS:
            raise ValueError(f"vectors: {self.vectors!r}, expected {' or '.join(VECTORS)}")
        if self.vocabulary_size < 1:
            raise ValueError(f"vocabulary_size: {self.vocabulary_size}, expected 1 or more")
        _some_pairs(self.max_pairs)


@dataclass
class AverageOptions:
    """Options of `optical train average`."""

    models: list[str] = field(
        default_factory=list,
        metadata={"help": "Two students or more of one start: Hugging Face names or folders."},
    )

    def validate(self) -> None:
        """Raise ValueError for options that cannot work, before anything is read."""
        if len(self.models) < 2:
            raise ValueError(f"models: {len(self.models)} given, expected two or more")


def _check_switching(lexicon: list[str], probability: float) -> None:
    for entry in lexicon:
        if "=" not in entry:
            raise ValueError(f"lexicon: {entry!r}, expected `language=file`")
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability: {probability}, expected a number from 0 to 1")


def _some_pairs(max_pairs: int | None) -> None:
    if max_pairs is not None and max_pairs < 1:
        raise ValueError(f"max_pairs: {max_pairs}, expected 1 or more")


def _required(name: str, value: str) -> None:
    if not value:
        raise ValueError(f"{name}: none given; expected a Hugging Face name or a folder")
