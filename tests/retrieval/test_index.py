"""Vectors that are kept: files find what memory finds, a database what its own MaxSim finds."""

import json

import pytest
import torch

pytest.importorskip("sentence_transformers", reason="the extra `train` is not installed")

from optical.data.collection import Collection
from optical.data.texts import iter_texts, read_texts
from optical.models.encoding import encode
from optical.models.retriever import load_retriever
from optical.retrieval import index
from optical.retrieval.exact_search import search, search_vectors
from optical.retrieval.index import FileIndex, LanceIndex, open_index, write_database, write_index


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
    found = list(documents), encode(model, list(documents.values()), "document")
    return search_vectors(queries, found, depth=10)


def agree(run, expected):
    assert run.keys() == expected.keys()
    for query, scores in expected.items():
        assert len(run[query]) == len(scores)
        assert list(run[query].values()) == pytest.approx(list(scores.values()), abs=2e-5)
        for key, score in run[query].items():
            assert score == pytest.approx(scores.get(key, min(scores.values())), abs=2e-5)


def test_files_are_searched_as_memory_is(model, documents, queries, expected, tmp_path, caplog):
    folder = write_index(model, documents.items(), tmp_path / "index", shard_texts=20)
    assert len(list(folder.glob("*.safetensors"))) == 3
    opened = open_index(folder)
    assert isinstance(opened, FileIndex) and len(opened) == 48 and opened.ids == list(documents)
    with caplog.at_level("INFO", logger="optical"):
        agree(opened.search(*queries, depth=10), expected)
    assert "20 of 48 documents searched" in caplog.text
    # The memory of one file and the scores of a tile: another tile, the same result.
    assert opened.search(*queries, depth=10, chunk_elements=300).keys() == expected.keys()


def test_one_file_is_in_memory_at_a_time(model, documents, queries, tmp_path, monkeypatch):
    folder = write_index(model, documents.items(), tmp_path / "index", shard_texts=12)
    import gc
    import weakref

    alive = []
    shards = FileIndex.shards

    def watched(self):
        for ids, found in shards(self):
            gc.collect()
            assert sum(one() is not None for one in alive) <= 1
            alive.append(weakref.ref(found.vectors))
            yield ids, found

    monkeypatch.setattr(FileIndex, "shards", watched)
    FileIndex(folder).search(*queries, depth=3)
    assert len(alive) == 4


def test_half_precision_is_half_the_size(model, documents, tmp_path):
    sizes = {}
    for precision in ("float32", "float16"):
        folder = write_index(model, documents.items(), tmp_path / precision, precision=precision)
        sizes[precision] = (folder / "00000.safetensors").stat().st_size
        found = next(FileIndex(folder).shards())[1]
        assert found.vectors.dtype == torch.float32
    assert sizes["float16"] < 0.6 * sizes["float32"]
    with pytest.raises(ValueError, match="precision: 'int8', expected"):
        write_index(model, documents.items(), tmp_path / "x", precision="int8")


def test_an_interrupted_writing_goes_on(model, documents, tmp_path, monkeypatch):
    folder, calls = tmp_path / "index", []

    def counted(*arguments, **options):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return encode(*arguments, **options)

    monkeypatch.setattr(index, "encode", counted)
    with pytest.raises(KeyboardInterrupt):
        write_index(model, documents.items(), folder, shard_texts=20)
    with pytest.raises(ValueError, match="no finished index"):
        FileIndex(folder)
    monkeypatch.setattr(index, "encode", encode)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert len(kept) == 2
    write_index(model, documents.items(), folder, shard_texts=20)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert len(FileIndex(folder, verify=True)) == 48
    with pytest.raises(ValueError, match="vectors of other texts or options"):
        write_index(model, documents.items(), folder, shard_texts=20, role="query")


def test_a_damaged_file_is_named(model, documents, tmp_path):
    folder = write_index(model, documents.items(), tmp_path / "index")
    path = folder / "00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"00000\.safetensors: does not fit its checksum"):
        FileIndex(folder, verify=True)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"00000\.safetensors: cannot be read"):
        FileIndex(folder)


def test_no_index(tmp_path):
    with pytest.raises(ValueError, match="no such folder; write the index first"):
        open_index(tmp_path / "nowhere")


def test_a_database_is_searched_by_its_own_maxsim(model, documents, queries, expected, tmp_path):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    place, texts = tmp_path / "base", dict(documents)
    first = dict(list(texts.items())[:30])
    assert write_database(model, first.items(), place, chunk_texts=16) == 30
    # What is there already stays; what is new is added.
    assert write_database(model, texts.items(), place, chunk_texts=16) == 18
    opened = open_index(place)
    assert isinstance(opened, LanceIndex) and len(opened) == 48 and opened.dimension == 16
    agree(opened.search(*queries, depth=10), expected)


@pytest.fixture(scope="module")
def long_documents(documents):
    """Three documents whose passages crowd the best rows, and short ones."""
    every = " ".join(documents.values())
    return {key: every if i < 3 else text for i, (key, text) in enumerate(documents.items())}


CUT = {"passage_length": 8, "passage_stride": 4}


@pytest.fixture(scope="module")
def best_passages(model, long_documents, world):
    collection = Collection("long", read_texts(world / "queries.tsv"), long_documents, {})
    return search(model, collection, depth=10, **CUT)


def test_files_of_passages_find_documents_by_the_best_one(
    model, long_documents, queries, best_passages, tmp_path
):
    folder = write_index(model, long_documents.items(), tmp_path / "index", shard_texts=20, **CUT)
    opened = open_index(folder)
    assert opened.ids == list(long_documents)
    assert sum(len(ids) for ids, _ in opened.shards()) > 2 * len(long_documents)
    agree(opened.search(*queries, depth=10), best_passages)
    with pytest.raises(ValueError, match="vectors of other texts or options"):
        write_index(model, long_documents.items(), folder, shard_texts=20, passage_length=8)


def test_a_database_of_passages_finds_documents_by_the_best_one(
    model, long_documents, queries, best_passages, tmp_path
):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    place = tmp_path / "base"
    assert write_database(model, long_documents.items(), place, **CUT) == len(long_documents)
    assert write_database(model, long_documents.items(), place, **CUT) == 0
    opened = open_index(place)
    assert len(opened) == len(long_documents) < opened.table.count_rows()
    agree(opened.search(*queries, depth=10), best_passages)
    with pytest.raises(ValueError, match="passage_stride 8 4, now 8 None; expected the same"):
        write_database(model, long_documents.items(), place, passage_length=8)


def test_a_database_refuses_what_it_would_compare_wrongly(
    model, documents, queries, tiny_models, tmp_path
):
    pytest.importorskip("lancedb", reason="the extra `index` is not installed")
    place = tmp_path / "base"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no index of token vectors"):
        open_index(tmp_path / "empty")
    write_database(model, list(documents.items())[:3], place)
    with pytest.raises(ValueError, match="vectors of size 16, the model makes them of size 24"):
        write_database(load_retriever(tiny_models.wide), documents.items(), place)
    ids, vectors = queries
    longer = type(vectors)(2 * vectors.vectors, vectors.lengths)
    with pytest.raises(ValueError, match="not of unit length"):
        LanceIndex(place).search(ids, longer)


@pytest.fixture
def bucket(monkeypatch):
    """Address of an empty bucket on a server that speaks S3, in this process."""
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
    place = f"{bucket}/base"
    with pytest.raises(ValueError, match="s3://vectors/base: no index of token vectors"):
        open_index(place)
    assert write_database(model, list(documents.items())[:30], place, chunk_texts=16) == 30
    assert write_database(model, documents.items(), place, chunk_texts=16) == 18
    opened = open_index(place)
    assert isinstance(opened, LanceIndex) and len(opened) == 48
    agree(opened.search(*queries, depth=10), expected)


def test_texts_are_read_one_by_one(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(
        json.dumps({"id": f"d{i}", "text": f"text {i}"}) + "\n" for i in range(3)
    ) + "broken\n")  # fmt: skip
    texts = iter_texts(tmp_path / "a.jsonl")
    assert next(texts) == ("d0", "text 0")
    with pytest.raises(ValueError, match=r"a\.jsonl:4"):
        list(texts)
