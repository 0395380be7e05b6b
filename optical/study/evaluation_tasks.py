"""Tasks that search and evaluate, measure tokenizers, and measure word alignments."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from optical.data.collection import Collection
from optical.data.trec import Run
from optical.io.files import write_text
from optical.models.encoding import TokenVectors
from optical.report.stored import EVALUATIONS
from optical.study.arms import ENCODER, TEACHER, ArmConfig, fill_languages
from optical.study.layout import Layout, file_name
from optical.study.pools import DEPTH
from optical.study.tasks import CEILING, Task


class EvaluationTasks:
    """Builds the evaluation tasks of a study. Each writes one JSON row into ``results``."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        # The teacher's token vectors of queries, which are the same for many arms and languages.
        self._query_vectors: dict[tuple[str, ...], TokenVectors] = {}

    def ceiling(self) -> Iterator[Task]:
        """Yield the evaluations of the monolingual ceiling, in which the teacher searches."""
        config = self.layout.config
        for role in config.roles:
            for language in config.ceiling:
                if self.layout.searched_collections(language, role):
                    arm = ArmConfig(CEILING, "none", {}, {}, "both")
                    yield self.evaluation(arm, language, 0, role)

    def evaluation(self, arm: ArmConfig, language: str, seed: int, role: str) -> Task:
        """Return the task that searches and evaluates all collections of a language."""
        layout = self.layout
        model = layout.model_name(arm, language, seed, role)
        collections = layout.searched_collections(language, role)
        members = [
            self.evaluation(member, language, layout.effective_seed(member, seed), role).output
            for member in map(layout.config.arm, arm.members)
        ]
        inputs: Any = [path.stem for path in members]
        if not members:
            inputs = layout.evaluation_inputs(arm, model, language, role, collections)
        stem = f"{file_name(arm.name)}-{language}-{seed}-{layout.fingerprints.of(inputs)}"
        output = layout.output / EVALUATIONS / f"{stem}.json"

        def run() -> None:
            from optical.data.trec import without_identical_ids, write_run
            from optical.retrieval.evaluation import evaluate
            from optical.retrieval.fusion import mean_scores

            measures: dict[str, Any] = {}
            search = None if members else self._searcher(arm, model, role)
            for name in collections:
                collection = layout.load_collection(name, language)
                if search is None:
                    runs = [self._read_run(self._run_path(name, path)) for path in members]
                    ranking = mean_scores(runs, DEPTH)
                else:
                    texts = self._with_arm_texts(arm, collection, language, role)
                    # The document that is left out must not shorten the ranking.
                    ignored = bool(layout.config.collections[name].get("ignore_identical_ids"))
                    ranking = search(texts, DEPTH + ignored)
                    if ignored:
                        ranking = without_identical_ids(ranking, DEPTH)
                path = self._run_path(name, output)
                write_run(ranking, path, tag=f"{file_name(arm.name)}-{language}-seed{seed}")
                evaluation = evaluate(ranking, collection.qrels, layout.config.measures)
                measures[name] = evaluation.per_query
            row = {"arm": arm.name, "language": language, "seed": seed, "measures": measures}
            _write_row(output, row | {"pairs": layout.count_pairs(arm, language)})

        label = f"evaluate {arm.name} {language} seed {seed}{layout.role_suffix(role)}"
        return Task(label, "evaluate", output, 1.0, run)

    def _run_path(self, collection: str, evaluated: Path) -> Path:
        """Return the run of a collection that belongs to the output of an evaluation."""
        return self.layout.output / "runs" / f"{collection}.{evaluated.stem}.run.gz"

    @staticmethod
    def _read_run(path: Path) -> Run:
        """Read a run of the study; one of a search without any result has no lines."""
        from optical.data.trec import read_run
        from optical.io.files import read_lines

        return read_run(path) if any(read_lines(path)) else {}

    def pool(self, arm: ArmConfig, seed: int) -> Iterator[Task]:
        """Yield the task that merges an arm's runs of several languages into one ranking."""
        layout, config = self.layout, self.layout.config
        if not config.pools:
            return
        evaluated = {
            language: self.evaluation(arm, language, seed, "document").output
            for languages in config.pools.values()
            for language in languages
        }
        stems = {language: path.stem for language, path in evaluated.items()}
        # The last entry changes with the definition of the language bias.
        inputs = [stems, config.pools, list(config.measures), "only queries with a result"]
        fingerprint = layout.fingerprints.of(inputs)
        name = f"pool-{file_name(arm.name)}-{seed}-{fingerprint}.json"
        output = layout.output / EVALUATIONS / name

        def run() -> None:
            pools = {
                name: self._pooled(name, {x: evaluated[x] for x in languages}, output)
                for name, languages in config.pools.items()
            }
            _write_row(output, {"arm": arm.name, "seed": seed, "pools": pools})

        yield Task(f"pool {arm.name} seed {seed}", "pool", output, 0.1, run)

    def _pooled(self, name: str, evaluated: dict[str, Path], output: Path) -> dict[str, Any]:
        """Write the pooled run of a collection; return its measures and its language bias."""
        from optical.data.trec import write_run
        from optical.retrieval.evaluation import evaluate
        from optical.study.pools import language_bias, merge_qrels, merge_runs

        runs = {x: self._read_run(self._run_path(name, path)) for x, path in evaluated.items()}
        qrels = {x: self.layout.load_collection(name, x).qrels for x in evaluated}
        # A run does not list queries without a result.
        runs = {x: {query: run.get(query, {}) for query in qrels[x]} for x, run in runs.items()}
        pooled, judged = merge_runs(runs), merge_qrels(qrels)
        if not judged:
            raise ValueError(
                f"collections.{name}.pool: no query has a relevant document in each of "
                f"{', '.join(evaluated)}; remove `pool`, or a language from it"
            )
        write_run(pooled, self._run_path(f"{name}-pool", output), tag=output.stem.rsplit("-", 1)[0])
        return {
            "measures": evaluate(pooled, judged, self.layout.config.measures).per_query,
            "bias": language_bias(pooled, judged, tuple(evaluated)),
        }

    def _searcher(self, arm: ArmConfig, model: str, role: str) -> Callable[[Collection, int], Run]:
        """Return a function that searches a collection, to a depth, with the models of an arm."""
        from optical.models.encoding import encode, use_bfloat16
        from optical.models.retriever import load_multi_vector, load_retriever
        from optical.retrieval.bm25 import search_bm25
        from optical.retrieval.dense import load_dense, search_dense
        from optical.retrieval.exact_search import search

        if arm.recipe == "bm25":
            return lambda collection, depth: search_bm25(collection, depth=depth, **arm.options)
        config = self.layout.config
        cuts: dict[str, Any] = {
            "passage_length": config.passage_length,
            "passage_stride": config.passage_stride,
        }
        prompts = {name: arm.options.get(name) for name in ("query_prompt", "document_prompt")}
        if arm.recipe == "dense":
            dense = load_dense(model, **prompts)
            if config.encode_bf16:
                use_bfloat16(dense)
            return lambda collection, depth: search_dense(dense, collection, depth=depth, **cuts)
        student = load_multi_vector(model, **prompts) if arm.pretrained else load_retriever(model)
        teacher = student if arm.encodes == "both" else load_retriever(self.layout.teacher_name)
        for searcher in (
            {id(x): x for x in (student, teacher)}.values() if config.encode_bf16 else ()
        ):
            use_bfloat16(searcher)
        queries, documents = (student, teacher) if role == "query" else (teacher, student)

        def search_collection(collection: Collection, depth: int) -> Run:
            query_vectors = None
            if queries is teacher and teacher is not student:
                texts = tuple(collection.queries.values())
                if texts not in self._query_vectors:
                    self._query_vectors[texts] = encode(teacher, texts, "query")
                query_vectors = self._query_vectors[texts]
            return search(
                queries,
                collection,
                depth=depth,
                document_model=documents,
                query_vectors=query_vectors,
                **cuts,
                progress=False,
            )

        return search_collection

    def _with_arm_texts(
        self, arm: ArmConfig, collection: Collection, language: str, role: str
    ) -> Collection:
        """Return the collection with the texts that the arm replaces or translates."""
        from optical.data.lexicon import invert_lexicon, read_lexicon, translate
        from optical.data.texts import read_texts

        contents: dict[str, Any] = {
            "queries": collection.queries,
            "documents": collection.documents,
        }
        for texts, path in arm.replace.items():
            file = fill_languages(path, [language]).replace("{collection}", collection.name)
            replacements = read_texts(file)
            missing = [key for key in contents[texts] if key not in replacements]
            if missing:
                raise ValueError(
                    f"{file}: no text for {len(missing)} {texts} of {collection.name}, such as "
                    f"{missing[0]!r}; add them"
                )
            contents[texts] = {key: replacements[key] for key in contents[texts]}
        for texts, name in arm.translate.items():
            lexicon = read_lexicon(self.layout.lexicon_path(name, language, role))
            foreign = "queries" if role == "query" else "documents"
            if texts == foreign:
                lexicon = invert_lexicon(lexicon)
            contents[texts] = {
                key: translate(text, lexicon) for key, text in contents[texts].items()
            }
        return dataclasses.replace(collection, **contents)

    def alignment(self) -> Iterator[Task]:
        """Yield the alignment of the sentence pair that the report shows."""
        layout, config = self.layout, self.layout.config
        settings = config.alignment
        distilled = [arm for arm in config.arms if arm.recipe == "distill"]
        if not settings or not distilled:
            return
        arm = config.arm(settings["arm"]) if "arm" in settings else distilled[0]
        seed = (arm.seeds or config.seeds)[0]
        model = layout.model_name(arm, settings["language"], seed, config.role)
        fingerprint = layout.fingerprints.of([layout.fingerprints.model(model), settings])
        output = layout.output / "results" / f"alignment-{fingerprint}.json"

        def run() -> None:
            from optical.models.retriever import load_retriever
            from optical.models.word_alignment import align_tokens

            aligned = align_tokens(
                load_retriever(model),
                load_retriever(layout.teacher_name),
                settings["other"],
                settings["english"],
                role=config.role,
            )
            _write_row(output, {"language": settings["language"], **aligned})

        yield Task("alignment", "evaluate", output, 0.2, run)

    def word_alignment(self, arm: ArmConfig, language: str, seed: int, role: str) -> Task:
        """Return the task that measures the alignment error rate of an arm against a lexicon."""
        layout = self.layout
        settings = layout.config.word_alignment
        assert settings is not None
        model = layout.model_name(arm, language, seed, role)
        bitext = fill_languages(settings["bitext"], [language])
        lexicon = layout.lexicon_path(settings["lexicon"], language, role)
        fingerprints = layout.fingerprints
        models = [fingerprints.model(model), fingerprints.model(layout.teacher_name)]
        inputs = [models, fingerprints.files([bitext, lexicon]), settings["max_pairs"], role]
        name = f"words-{file_name(arm.name)}-{language}-{seed}-{fingerprints.of(inputs)}.json"
        output = layout.output / "results" / name

        def run() -> None:
            from optical.data.lexicon import read_lexicon
            from optical.data.pairs import read_bitext_pairs
            from optical.models.retriever import load_retriever
            from optical.models.word_alignment import alignment_error_rate, word_links

            pairs = read_bitext_pairs(bitext)[: settings["max_pairs"]]
            models = load_retriever(model), load_retriever(layout.teacher_name)
            links = word_links(*models, pairs, role=role)
            rate, sure = alignment_error_rate(links, pairs, read_lexicon(lexicon))
            row = {"arm": arm.name, "language": language, "seed": seed, "role": role}
            _write_row(output, {**row, "aer": rate, "links": sure})

        label = f"words {arm.name} {language} seed {seed}{layout.role_suffix(role)}"
        return Task(label, "words", output, 0.5, run)

    def tokens(self) -> Iterator[Task]:
        """Yield the tasks that measure how the tokenizers split each language."""
        config = self.layout.config
        for language in (*config.languages, *config.ceiling):
            collections = [
                name
                for role in config.roles
                for name in self.layout.searched_collections(language, role)
            ]
            if collections:
                yield self._language_tokens(language, collections)

    def _language_tokens(self, language: str, collections: list[str]) -> Task:
        layout, config = self.layout, self.layout.config
        models = {TEACHER: layout.teacher_name}
        if any(ENCODER in arm.start for arm in config.arms):
            models[ENCODER] = layout.encoder_name
        models |= self._vocabularies(language)
        bitext = config.bitext_of(language)
        inputs = [
            {key: layout.fingerprints.model(name) for key, name in models.items()},
            layout.collection_inputs(collections, language),
            *([layout.fingerprints.files(bitext)] if bitext else []),
        ]
        name = f"tokens-{language}-{layout.fingerprints.of(inputs)}.json"
        output = layout.output / "results" / name
        run = functools.partial(self._measure_tokens, language, collections, models, bitext, output)
        return Task(f"tokens {language}", "words", output, 0.1, run)

    def _measure_tokens(
        self,
        language: str,
        collections: list[str],
        models: dict[str, str],
        bitext: list[str],
        output: Path,
    ) -> None:
        """Measure how tokenizers split a language, and the words that its bitext lacks."""
        from transformers import AutoTokenizer

        from optical.data.lexicon import share_unseen
        from optical.data.pairs import read_bitext_pairs
        from optical.models.retriever import resolve_model
        from optical.models.tokenizers import fertility

        texts: list[str] = []
        for name in collections:
            collection = self.layout.load_collection(name, language)
            is_query = self.layout.config.role_of(name) == "query"
            texts += (collection.queries if is_query else collection.documents).values()
        statistics = {
            key: fertility(AutoTokenizer.from_pretrained(resolve_model(name)), texts)
            for key, name in models.items()
        }
        row: dict[str, Any] = {"language": language, "tokens": statistics}
        if bitext:
            foreign = (other for path in bitext for _, other in read_bitext_pairs(path))
            row["unseen"] = share_unseen(texts, foreign)
        _write_row(output, row)

    def _vocabularies(self, language: str) -> dict[str, str]:
        """Return arm -> model of the arms with a new vocabulary, one arm per vocabulary."""
        layout, config = self.layout, self.layout.config
        models: dict[str, str] = {}
        seen = []
        for arm in config.arms:
            if arm.recipe != "transfer" or not (arm.multilingual or language in config.languages):
                continue
            options = layout.options(arm, language, config.seeds[0], config.roles[0])
            # The input vectors may differ while the vocabulary is the same.
            vocabulary_options = dataclasses.replace(options, initialize_from="")
            if vocabulary_options not in seen:
                seen.append(vocabulary_options)
                models[arm.name] = layout.model_name(
                    arm, language, config.seeds[0], config.roles[0]
                )
        return models


def _write_row(output: Path, row: dict[str, Any]) -> None:
    write_text(output, json.dumps(row) + "\n")
