"""Persistent indexes: files and LanceDB give the same runs as a search in memory."""

import gc
import json
import threading
import weakref

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")

from optical.data.collection import Collection
from optical.data.texts import iter_texts, read_texts
from optical.models.encoding import encode
from optical.models.fingerprint import fingerprints, set_partners
from optical.models.retriever import load_retriever
from optical.models.token_store import StoreWriter, write_vectors
from optical.retrieval import database
from optical.retrieval.exact_search import search, search_vectors
from optical.retrieval.index import (
    FileIndex,
    LanceIndex,
    build_approximate,
    open_index,
    write_database,
    write_index,
)
from optical.retrieval.origin import Origin


@pytest.fixture(scope="module")
def model(tiny_models):
    return load_retriever(tiny_models.teacher)


@pytest.fixture(scope="module")
def documents(world):
    return read_texts(world / "documents/en.jsonl")


@pytest.fixture(scope="module")
def queries(world, model):
    texts = read_texts(world / "queries.tsv")
    return list(texts), encode(model, list(texts.values()), "query")


@pytest.fixture(scope="module")
def expected(model, documents, queries):
    encoded = list(documents), encode(model, list(documents.values()), "document")
    return search_vectors(queries, encoded, depth=10)


def assert_equal_runs(run, expected):
    assert run.keys() == expected.keys()
    for query, scores in expected.items():
        assert len(run[query]) == len(scores)
        assert list(run[query].values()) == pytest.approx(list(scores.values()), abs=2e-5)
        for key, score in run[query].items():
            assert score == pytest.approx(scores.get(key, min(scores.values())), abs=2e-5)


def test_a_file_index_gives_the_run_of_a_search_in_memory(
    model, documents, queries, expected, tmp_path, caplog
):
    folder = write_index(model, documents.items(), tmp_path / "index", shard_texts=20)
    assert len(list(folder.glob("*.safetensors"))) == 3
    index = open_index(folder)
    assert isinstance(index, FileIndex) and len(index) == 48 and index.ids == list(documents)
    with caplog.at_level("INFO", logger="optical"):
        assert_equal_runs(index.search(*queries, depth=10), expected)
    assert "20 of 48 documents searched" in caplog.text
    # The tile size does not change the result.
    assert index.search(*queries, depth=10, chunk_elements=300).keys() == expected.keys()


def test_one_shard_is_in_memory_at_a_time(model, documents, queries, tmp_path, monkeypatch):
    folder = write_index(model, documents.items(), tmp_path / "index", shard_texts=12)
    alive = []
    shards = FileIndex.shards

    def watched(self):
        for ids, tokens in shards(self):
            gc.collect()
            assert sum(vectors() is not None for vectors in alive) <= 1
            alive.append(weakref.ref(tokens.vectors))
            yield ids, tokens

    monkeypatch.setattr(FileIndex, "shards", watched)
    FileIndex(folder).search(*queries, depth=3)
    assert len(alive) == 4


def test_half_precision_halves_the_size(model, documents, tmp_path):
    sizes = {}
    for precision in ("float32", "float16"):
        folder = write_index(model, documents.items(), tmp_path / precision, precision=precision)
        sizes[precision] = (folder / "00000.safetensors").stat().st_size
        tokens = next(FileIndex(folder).shards())[1]
        assert tokens.vectors.dtype == torch.float32
    assert sizes["float16"] < 0.6 * sizes["float32"]
    with pytest.raises(ValueError, match="precision: 'int8', expected"):
        write_index(model, documents.items(), tmp_path / "x", precision="int8")


def test_an_interrupted_write_resumes(model, documents, tmp_path, monkeypatch):
    folder, calls = tmp_path / "index", []
    write = StoreWriter.write

    def interrupted(self, *arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        write(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StoreWriter, "write", interrupted)
        write_index(model, documents.items(), folder, shard_texts=20)
    with pytest.raises(ValueError, match="no finished store"):
        FileIndex(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(times) == 2
    write_index(model, documents.items(), folder, shard_texts=20)
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    assert len(FileIndex(folder, verify=True)) == 48
    with pytest.raises(ValueError, match=r"vectors of another role \(document, now query\)"):
        write_index(model, documents.items(), folder, shard_texts=20, role="query")
    with pytest.raises(ValueError, match="vectors of other texts or options"):
        write_index(model, list(documents.items())[1:], folder, shard_texts=20)


def test_errors_of_a_damaged_shard_name_the_file(model, documents, queries, tmp_path):
    folder = write_index(model, documents.items(), tmp_path / "index")
    path = folder / "00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00000\.safetensors: does not match its checksum"):
        FileIndex(folder, verify=True)
    # A search reads every file, so it finds the damage too.
    with pytest.raises(ValueError, match=r"00000\.safetensors: does not match its checksum"):
        FileIndex(folder).search(*queries, depth=3)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"00000\.safetensors: cannot be read"):
        FileIndex(folder)
    # Writing again replaces the damaged shard.
    write_index(model, documents.items(), folder)
    assert len(FileIndex(folder, verify=True)) == 48


@pytest.mark.parametrize(
    "content",
    [
        *("[]", "null", "{}", '{"files": 1}', '{"files": {}, "dimension": 16, "role": "document"}'),
        '{"files": {"../x": "0"}, "dimension": 16, "role": "document"}',
        '{"files": {"x": "0"}, "dimension": "16", "role": "document"}',
    ],
)
def test_an_index_file_of_something_else_is_refused(tmp_path, content):
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match=r"index\.json: is no index of token vectors; write"):
        open_index(tmp_path)


def test_a_folder_holds_one_kind_of_vectors(model, documents, tmp_path):
    write_vectors(model, ["a text"], tmp_path / "teacher", role="document")
    with pytest.raises(ValueError, match="teacher: holds a teacher's vectors for training"):
        open_index(tmp_path / "teacher")
    write_index(model, documents.items(), tmp_path / "files")
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    with pytest.raises(ValueError, match="files: holds token vectors in files; choose another"):
        write_database(model, documents.items(), tmp_path / "files")
    write_database(model, documents.items(), tmp_path / "base")
    with pytest.raises(ValueError, match="base: holds a database of `optical index`; choose"):
        write_index(model, documents.items(), tmp_path / "base")


def test_opening_a_missing_index_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such folder; write the index first"):
        open_index(tmp_path / "nowhere")


def test_a_database_gives_the_run_of_a_search_in_memory(
    model, documents, queries, expected, tmp_path
):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    location, texts = tmp_path / "base", dict(documents)
    first = dict(list(texts.items())[:30])
    assert write_database(model, first.items(), location, chunk_texts=16) == 30
    # Existing documents are skipped, new ones are added.
    assert write_database(model, texts.items(), location, chunk_texts=16) == 18
    index = open_index(location)
    assert isinstance(index, LanceIndex) and len(index) == 48 and index.dimension == 16
    assert_equal_runs(index.search(*queries, depth=10), expected)


@pytest.fixture(scope="module")
def long_documents(documents):
    """Documents of which three have many passages that fill the top ranks."""
    long_text = " ".join(documents.values())
    return {key: long_text if i < 3 else text for i, (key, text) in enumerate(documents.items())}


CUT = {"passage_length": 8, "passage_stride": 4}


@pytest.fixture(scope="module")
def best_passages(model, long_documents, world):
    collection = Collection("long", read_texts(world / "queries.tsv"), long_documents, {})
    return search(model, collection, depth=10, **CUT)


def test_a_file_index_ranks_documents_by_their_best_passage(
    model, long_documents, queries, best_passages, tmp_path
):
    folder = write_index(model, long_documents.items(), tmp_path / "index", shard_texts=20, **CUT)
    index = open_index(folder)
    assert index.ids == list(long_documents)
    assert sum(len(ids) for ids, _ in index.shards()) > 2 * len(long_documents)
    assert_equal_runs(index.search(*queries, depth=10), best_passages)
    with pytest.raises(ValueError, match="vectors of another passages"):
        write_index(model, long_documents.items(), folder, shard_texts=20, passage_length=8)


def test_a_database_ranks_documents_by_their_best_passage(
    model, long_documents, queries, best_passages, tmp_path
):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    location = tmp_path / "base"
    assert write_database(model, long_documents.items(), location, **CUT) == len(long_documents)
    assert write_database(model, long_documents.items(), location, **CUT) == 0
    index = open_index(location)
    assert len(index) == len(long_documents) < index.table.count_rows()
    assert_equal_runs(index.search(*queries, depth=10), best_passages)
    with pytest.raises(ValueError, match="passage_stride 8 4, now 8 None; expected the same"):
        write_database(model, long_documents.items(), location, passage_length=8)


def test_a_database_refuses_vectors_that_it_cannot_compare(
    model, documents, queries, tiny_models, tmp_path
):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    location = tmp_path / "base"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no index of token vectors"):
        open_index(tmp_path / "empty")
    write_database(model, list(documents.items())[:3], location)
    with pytest.raises(ValueError, match="vectors of size 16, the model makes them of size 24"):
        write_database(load_retriever(tiny_models.wide), documents.items(), location)
    ids, vectors = queries
    longer = type(vectors)(2 * vectors.vectors, vectors.lengths)
    with pytest.raises(ValueError, match="not of unit length"):
        LanceIndex(location).search(ids, longer)


@pytest.fixture
def retrained(tiny_models):
    """A model of the same name, dimension and settings as `model`, with other weights."""
    other = load_retriever(tiny_models.teacher)
    with torch.no_grad():
        next(other.parameters()).mul_(1.5)
    return other


def test_an_index_belongs_to_one_model_by_content(model, retrained, documents, tmp_path, caplog):
    folder = write_index(model, documents.items(), tmp_path / "index")
    with pytest.raises(ValueError, match="vectors of another model, by its content"):
        write_index(retrained, documents.items(), folder)
    FileIndex(folder).origin.check_searchable(model, folder)
    with pytest.raises(ValueError, match="index: its documents were encoded by another model"):
        FileIndex(folder).origin.check_searchable(retrained, folder)
    # A student of the model of the index may search it.
    set_partners(retrained, fingerprints(model).values())
    FileIndex(folder).origin.check_searchable(retrained, folder)
    write_index(model, documents.items(), tmp_path / "queries", role="query")
    with pytest.raises(ValueError, match="its texts were encoded as queries"):
        FileIndex(tmp_path / "queries").origin.check_searchable(model, "queries")
    Origin("", "document").check_searchable(model, "old")
    assert "old: records no model" in caplog.text


def test_a_database_belongs_to_one_model_by_content(model, retrained, documents, tmp_path):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    texts = list(documents.items())
    write_database(model, texts[:30], tmp_path / "base")
    with pytest.raises(ValueError, match="vectors of two models cannot be mixed"):
        write_database(retrained, texts, tmp_path / "base")
    assert len(LanceIndex(tmp_path / "base")) == 30
    with pytest.raises(ValueError, match="base: its documents were encoded by another model"):
        LanceIndex(tmp_path / "base").origin.check_searchable(retrained, tmp_path / "base")
    LanceIndex(tmp_path / "base").origin.check_searchable(model, tmp_path / "base")


def test_two_writers_add_each_document_once(model, documents, tmp_path, monkeypatch):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    location, encode_rows = tmp_path / "base", database.encode_rows
    second = []

    def interleaved(*arguments):
        rows = encode_rows(*arguments)
        if not second:
            # The second writer adds the chunk that the first has just encoded.
            second.append(True)
            second.append(write_database(model, list(documents.items())[:20], location))
        return rows

    monkeypatch.setattr(database, "encode_rows", interleaved)
    first = write_database(model, documents.items(), location, chunk_texts=16)
    index = LanceIndex(location)
    assert (first, second[1]) == (28, 20)
    assert len(index) == index.table.count_rows() == 48


def test_a_database_refuses_a_document_whose_text_has_changed(model, documents, tmp_path):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    write_database(model, documents.items(), tmp_path / "base")
    with pytest.raises(ValueError, match="base: document 'd3' had another text when it was added"):
        write_database(model, (documents | {"d3": "another text"}).items(), tmp_path / "base")
    assert write_database(model, (documents | {"e": "new"}).items(), tmp_path / "base") == 1


def test_two_writers_may_create_one_database_in_an_object_store(model, documents, bucket):
    """Nothing locks an object store, so both may find no table and create it."""
    ready, added = threading.Barrier(2), []

    def write():
        ready.wait()
        added.append(write_database(model, documents.items(), f"{bucket}/two", chunk_texts=16))

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    index = LanceIndex(f"{bucket}/two")
    assert sum(added) == len(index) == index.table.count_rows() == 48 and len(added) == 2


def test_a_database_in_memory_is_refused(model, documents):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    for use in (open_index, lambda address: write_database(model, documents.items(), address)):
        with pytest.raises(ValueError, match="memory://base: a database in memory ends with its"):
            use("memory://base")


@pytest.mark.parametrize("kind", ["files", "database"])
def test_several_workers_write_one_index(model, documents, queries, expected, kind, tmp_path):
    if kind == "database":
        pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    location, counts = tmp_path / "index", []
    for worker in (2, 0, 1, 1):  # the last one repeats its part and adds nothing
        share = {"worker": worker, "workers": 3}
        if kind == "files":
            write_index(model, documents.items(), location, shard_texts=10, **share)
            counts.append((location / "index.json").is_file())
        else:
            counts.append(
                write_database(model, documents.items(), location, chunk_texts=10, **share)
            )
    assert counts == ([False, False, True, True] if kind == "files" else [10, 20, 18, 0])
    index = open_index(location)
    assert len(index) == 48
    if kind == "files":
        assert index.ids == list(documents)
    else:
        assert index.table.count_rows() == 48
    assert_equal_runs(index.search(*queries, depth=10), expected)
    write = write_index if kind == "files" else write_database
    with pytest.raises(ValueError, match="worker: 3, expected a number from 0 to 2"):
        write(model, documents.items(), location, worker=3, workers=3)


def test_approximate_search_finds_most_documents_with_exact_scores(
    model, documents, queries, tmp_path
):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    location = tmp_path / "base"
    words = [word for text in documents.values() for word in text.split()]
    spans = [(i, length) for length in (4, 6) for i in range(len(words) - 6)]
    many = {f"m{i}-{length}": " ".join(words[i : i + length]) for i, length in spans}
    write_database(model, list(many.items())[:100], location)
    with pytest.raises(ValueError, match="100 rows, but an approximate index needs 256"):
        build_approximate(location)
    write_database(model, many.items(), location)
    ids, vectors = queries
    with pytest.raises(ValueError, match="base: has no approximate index; build it with"):
        LanceIndex(location).search(ids, vectors, approximate=True)
    build_approximate(location)
    index = LanceIndex(location)
    exact = index.search(ids, vectors, depth=10)
    found = index.search(ids, vectors, depth=10, approximate=True)
    scores = index.search(ids, vectors, depth=len(many))
    for query, run in found.items():
        assert len(run) == 10
        assert run == pytest.approx({key: scores[query][key] for key in run}, abs=1e-4)
    assert index.recall(ids, vectors, exact, depth=10) == 1
    assert index.recall(ids, vectors, found, depth=10) > 0.6
    half = {query: dict(list(run.items())[:5]) for query, run in exact.items()}
    assert index.recall(ids, vectors, half, depth=10, sample=2) == 0.5
    # Documents added later are found before the index is built again, which then covers them.
    write_database(model, documents.items(), location)
    index = LanceIndex(location)
    assert index.search(ids, vectors, depth=1000, approximate=True, refine=1)[ids[0]].keys() & (
        documents.keys()
    )
    build_approximate(location)
    build_approximate(location)
    assert LanceIndex(location).table.index_stats("vector_idx").num_unindexed_rows == 0


def test_a_wrong_score_of_the_database_is_noticed(model, documents, tmp_path, monkeypatch):
    lancedb = pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    write_database(model, list(documents.items())[:3], tmp_path / "base")
    LanceIndex(tmp_path / "base")
    builder = type(lancedb.connect(tmp_path / "base").open_table("documents").search([[0.0] * 16]))
    # A MaxSim that compares by the Euclidean distance, as if the metric were ignored.
    monkeypatch.setattr(builder, "distance_type", lambda self, metric: self)
    with pytest.raises(ValueError, match=r"LanceDB .* gives document 'd0' the score"):
        LanceIndex(tmp_path / "base")


@pytest.fixture
def bucket(monkeypatch):
    """Return the address of an empty bucket on an S3 server in this process."""
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    boto3 = pytest.importorskip("boto3", reason="the extra `dev` is not installed (boto3)")
    threaded = pytest.importorskip(
        "moto.moto_server.threaded_moto_server", reason="the extra `dev` is not installed (moto)"
    )
    server = threaded.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    settings = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "name",
        "AWS_SECRET_ACCESS_KEY": "word",
        "AWS_REGION": "us-east-1",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3", region_name="us-east-1").create_bucket(Bucket="vectors")
    yield "s3://vectors"
    server.stop()


def test_a_database_in_an_object_store(model, documents, queries, expected, bucket):
    location = f"{bucket}/base"
    with pytest.raises(ValueError, match="s3://vectors/base: no index of token vectors"):
        open_index(location)
    assert write_database(model, list(documents.items())[:30], location, chunk_texts=16) == 30
    assert write_database(model, documents.items(), location, chunk_texts=16) == 18
    index = open_index(location)
    assert isinstance(index, LanceIndex) and len(index) == 48
    assert_equal_runs(index.search(*queries, depth=10), expected)


def test_texts_are_read_lazily(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(3)
    ) + "broken\n")  # fmt: skip
    texts = iter_texts(tmp_path / "a.jsonl")
    assert next(texts) == ("d0", "text 0")
    with pytest.raises(ValueError, match=r"a\.jsonl:4"):
        list(texts)
