"""The cells of a study that measure: search and evaluation, tokens, and word alignments."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

from optical.data.collection import Collection
from optical.data.trec import Run
from optical.io.files import write_text
from optical.models.encoding import TokenVectors
from optical.study.arms import ENCODER, TEACHER, ArmConfig, filled
from optical.study.config import StudyConfig
from optical.study.layout import Places, file_name
from optical.study.tasks import Cell


class Measuring(Places):
    """Makes the cells that measure what the trainings made."""

    def __init__(self, config: StudyConfig) -> None:
        super().__init__(config)
        # Vectors of queries by the teacher.
        self._asked: dict[tuple[str, ...], TokenVectors] = {}

    def evaluation_cell(self, arm: ArmConfig, language: str, seed: int, role: str) -> Cell:
        config = self.config
        model = self.student_name(arm, language, seed, role)
        names = self.searched(language, role)
        parts = self.evaluation_parts(arm, model, language, role, names)
        stem = f"{file_name(arm.name)}-{language}-{seed}-{self.prints.of(parts)}"
        mark = self.output / "results" / f"{stem}.json"

        def run() -> None:
            from optical.data.trec import write_run
            from optical.retrieval.evaluation import evaluate

            found: dict[str, Any] = {}
            searcher = self._searcher(arm, model, role)
            for name in names:
                collection = self._read_by(arm, self.collection(name, language), language, role)
                ranking = searcher(collection)
                path = self.output / "runs" / f"{name}.{stem}.run.gz"
                write_run(ranking, path, tag=f"optical-{file_name(arm.name)}")
                found[name] = evaluate(ranking, collection.qrels, config.measures).per_query
            row = {
                "arm": arm.name,
                "language": language,
                "seed": seed,
                "measures": found,
                "pairs": self.pairs(arm, language),
            }
            write_text(mark, json.dumps(row) + "\n")

        label = f"evaluate {arm.name} {language} seed {seed}{self.of_role(role)}"
        return Cell(label, "evaluate", mark, 1.0, run)

    def _searcher(self, arm: ArmConfig, model: str, role: str) -> Callable[[Collection], Run]:
        """A function that searches a collection as the arm does."""
        from optical.models.encoding import encode
        from optical.models.retriever import load_retriever
        from optical.retrieval.bm25 import search_bm25
        from optical.retrieval.exact_search import search

        if arm.recipe == "bm25":
            return lambda collection: search_bm25(collection, **arm.settings)
        student = load_retriever(model)
        teacher = student if arm.encodes == "both" else load_retriever(self.teacher_name)
        queries, documents = (student, teacher) if role == "query" else (teacher, student)

        def searched(collection: Collection) -> Run:
            vectors = None
            if queries is teacher and teacher is not student:
                # The teacher reads the same queries for every arm and language.
                texts = tuple(collection.queries.values())
                if texts not in self._asked:
                    self._asked[texts] = encode(teacher, texts, "query")
                vectors = self._asked[texts]
            return search(
                queries,
                collection,
                document_model=documents,
                query_vectors=vectors,
                passage_length=self.config.passage_length,
                passage_stride=self.config.passage_stride,
                progress=False,
            )

        return searched

    def _read_by(
        self, arm: ArmConfig, collection: Collection, language: str, role: str
    ) -> Collection:
        """The collection with the texts that the arm reads: translated, or as they are."""
        from optical.data.lexicon import invert_lexicon, read_lexicon, translate
        from optical.data.texts import read_texts

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
            lexicon = read_lexicon(self.table(table, language, role))
            foreign = "queries" if role == "query" else "documents"
            chosen = invert_lexicon(lexicon) if side == foreign else lexicon
            texts[side] = {key: translate(text, chosen) for key, text in texts[side].items()}
        return dataclasses.replace(collection, **texts)

    def alignment_cells(self) -> Iterator[Cell]:
        chosen = self.config.alignment
        distilled = [arm for arm in self.config.arms if arm.recipe == "distill"]
        if not chosen or not distilled:
            return
        arm = self.config.arm(chosen["arm"]) if "arm" in chosen else distilled[0]
        role = self.config.role
        seed = (arm.seeds or self.config.seeds)[0]
        model = self.student_name(arm, chosen["language"], seed, role)
        parts = self.prints.of([self.prints.model(model), chosen])
        mark = self.output / "results" / f"alignment-{parts}.json"

        def run() -> None:
            from optical.models.retriever import load_retriever
            from optical.models.word_alignment import align_tokens

            aligned = align_tokens(
                load_retriever(model),
                load_retriever(self.teacher_name),
                chosen["other"],
                chosen["english"],
                role=role,
            )
            write_text(mark, json.dumps({"language": chosen["language"], **aligned}) + "\n")

        yield Cell("alignment", "evaluate", mark, 0.2, run)

    def word_cell(self, arm: ArmConfig, language: str, seed: int, role: str) -> Cell:
        """How far an arm's plans link the words that a word table calls translations."""
        chosen = self.config.word_alignment
        assert chosen is not None
        model = self.student_name(arm, language, seed, role)
        bitext = filled(chosen["bitext"], [language])
        table = self.table(chosen["lexicon"], language, role)
        models = [self.prints.model(model), self.prints.model(self.teacher_name)]
        parts = [models, self.prints.files([bitext, table]), chosen["max_pairs"], role]
        name = f"words-{file_name(arm.name)}-{language}-{seed}-{self.prints.of(parts)}.json"
        mark = self.output / "results" / name

        def run() -> None:
            from optical.data.lexicon import read_lexicon
            from optical.data.pairs import read_bitext_pairs
            from optical.models.retriever import load_retriever
            from optical.models.word_alignment import alignment_error_rate, word_links

            pairs = read_bitext_pairs(bitext)[: chosen["max_pairs"]]
            towers = load_retriever(model), load_retriever(self.teacher_name)
            links = word_links(*towers, pairs, role=role)
            rate, sure = alignment_error_rate(links, pairs, read_lexicon(table))
            row = {"arm": arm.name, "language": language, "seed": seed, "role": role}
            write_text(mark, json.dumps({**row, "aer": rate, "links": sure}) + "\n")

        label = f"words {arm.name} {language} seed {seed}{self.of_role(role)}"
        return Cell(label, "words", mark, 0.5, run)

    def token_cell(self, language: str) -> Cell:
        """How finely the tokenizers cut a language, and what they do not know of it."""
        config = self.config
        names = [name for role in config.roles for name in self.searched(language, role)]
        models = {TEACHER: self.teacher_name}
        if any(ENCODER in arm.start for arm in config.arms):
            models[ENCODER] = self.encoder_name
        models |= self._vocabularies(language)
        parts = [
            {key: self.prints.model(name) for key, name in models.items()},
            self.files(names, language),
        ]
        mark = self.output / "results" / f"tokens-{language}-{self.prints.of(parts)}.json"

        def run() -> None:
            from transformers import AutoTokenizer

            from optical.models.retriever import resolve_model
            from optical.models.tokenizers import fertility

            texts: list[str] = []
            for name in names:
                collection = self.collection(name, language)
                query = config.role_of(name) == "query"
                texts += (collection.queries if query else collection.documents).values()
            row = {
                key: fertility(AutoTokenizer.from_pretrained(resolve_model(name)), texts)
                for key, name in models.items()
            }
            write_text(mark, json.dumps({"language": language, "tokens": row}) + "\n")

        return Cell(f"tokens {language}", "words", mark, 0.1, run)

    def _vocabularies(self, language: str) -> dict[str, str]:
        """Arms that brought a vocabulary of their own, each vocabulary once, and their models."""
        config = self.config
        found: dict[str, str] = {}
        known = []
        for arm in config.arms:
            if arm.recipe != "transfer" or not (arm.multilingual or language in config.languages):
                continue
            options = self.options(arm, language, config.seeds[0], config.roles[0])
            # The same units may start from different vectors.
            units = dataclasses.replace(options, vectors="")
            if units not in known:
                known.append(units)
                found[arm.name] = self.student_name(arm, language, config.seeds[0], config.roles[0])
        return found
