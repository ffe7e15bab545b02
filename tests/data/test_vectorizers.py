"""Vectorisers against scikit-learn, and across a save and a load."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer

from slidex.data.vectorizers import (
    HashingTextVectorizer,
    PythonSourceVectorizer,
    TfidfFitter,
    load_vectorizer,
)
from slidex.errors import ConfigError, DataError

TEXTS = [
    "The quick brown fox jumps over the lazy dog",
    "the dog, the dog and the fox",
    "",
    "Numbers like 42 and words-with-dashes; façade naïve",
    "a quick naïve dog",
    "fox fox fox lazy",
]


def npy(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


PICKLED, TWO_NUMBERS = npy(np.array([{}], dtype=object)), npy(np.ones(2))


def fitted(texts=TEXTS, **options):
    fitter = TfidfFitter(**options)
    for text in texts:
        fitter.add([text])
    return fitter.finish()


def same(a, b):
    np.testing.assert_array_equal(a.indptr, b.indptr)
    np.testing.assert_array_equal(a.indices, b.indices)
    assert a.num_columns == b.num_columns
    if a.values is None:
        assert b.values is None
    else:
        np.testing.assert_array_equal(a.values, b.values)


@pytest.mark.parametrize("ngram_range", [(1, 1), (1, 3)])
@pytest.mark.parametrize("min_df", [1, 2])
def test_streamed_tfidf_equals_scikit_learn(ngram_range, min_df):
    reference = TfidfVectorizer(ngram_range=ngram_range, min_df=min_df, sublinear_tf=True, dtype=np.float32)
    expected = reference.fit_transform(TEXTS)
    ours = fitted(ngram_range=ngram_range, min_df=min_df)
    assert ours.vocabulary == list(reference.get_feature_names_out())
    got = ours.transform(TEXTS)
    assert got.values.dtype == np.float32
    np.testing.assert_allclose(got.to_scipy().toarray(), expected.toarray(), rtol=1e-6)


def test_max_features_keeps_the_words_in_most_documents():
    texts = ["bb aa", "bb aa", "bb cc cc cc cc", "dd"]
    assert fitted(texts, max_features=1).vocabulary == ["bb"]
    assert fitted(texts, max_features=2).vocabulary == ["aa", "bb"]
    assert fitted(texts, max_features=3).vocabulary == ["aa", "bb", "cc"]  # a tie with dd: alphabetical
    assert fitted(texts, max_features=99).num_features == 4


def test_hashing_equals_scikit_learn():
    reference = HashingVectorizer(n_features=512, alternate_sign=False, dtype=np.float32, ngram_range=(1, 2))
    got = HashingTextVectorizer(512, (1, 2)).transform(TEXTS)
    np.testing.assert_array_equal(got.to_scipy().toarray(), reference.transform(TEXTS).toarray())
    norms = np.linalg.norm(got.to_scipy().toarray(), axis=1)
    np.testing.assert_allclose(norms[[0, 1, 3]], 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "vectorizer",
    [
        pytest.param(fitted(ngram_range=(1, 2)), id="tfidf"),
        pytest.param(HashingTextVectorizer(1024, (1, 2)), id="hashing"),
        pytest.param(PythonSourceVectorizer(4096), id="python-source"),
    ],
)
def test_save_and_load_give_the_same_rows_without_pickle(vectorizer, tmp_path):
    vectorizer.save(tmp_path / "v")
    loaded = load_vectorizer(tmp_path / "v")
    assert type(loaded) is type(vectorizer)
    assert loaded.num_features == vectorizer.num_features
    same(loaded.transform(TEXTS), vectorizer.transform(TEXTS))
    same(loaded.transform([]), vectorizer.transform([]))
    assert {path.suffix for path in (tmp_path / "v").iterdir()} <= {".json", ".npy"}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("vectorizer.json", None, "found none"),
        ("vectorizer.json", b"{", "expected JSON"),
        ("vectorizer.json", b"[]", "JSON dict"),
        ("vectorizer.json", b'{"kind": "pickle"}', "'pickle'"),
        ("vectorizer.json", b'{"kind": "tfidf", "ngram_range": [2, 1]}', "ngram_range"),
        ("vectorizer.json", b'{"kind": "tfidf"}', "ngram_range"),
        ("vectorizer.json", b'{"kind": "python-source", "num_features": 0}', "num_features"),
        ("vectorizer.json", b'{"kind": "hashing", "ngram_range": [1, 1]}', "num_features"),
        ("vocabulary.json", None, "found none"),
        ("idf.npy", PICKLED, "expected a .npy array"),
        ("idf.npy", TWO_NUMBERS, "expected 17 finite float64 values, found float64"),
        ("vocabulary.json", b"[1, 2]", "strings"),
        ("vocabulary.json", b'["a", "a"]', "different strings"),
        ("idf.npy", None, "expected a .npy array"),
        ("idf.npy", b"junk", "expected a .npy array"),
    ],
)
def test_a_damaged_vectorizer_is_refused_by_name(tmp_path, file, content, message):
    fitted().save(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load_vectorizer(tmp_path)
    assert str(tmp_path / file) in str(caught.value)


def test_settings_are_plain_json(tmp_path):
    fitted(ngram_range=(1, 2)).save(tmp_path)
    assert json.loads((tmp_path / "vectorizer.json").read_text()) == {"kind": "tfidf", "ngram_range": [1, 2]}


@pytest.mark.parametrize(
    "make",
    [
        lambda: TfidfFitter(ngram_range=(0, 1)),
        lambda: TfidfFitter(ngram_range=(2, 1)),
        lambda: TfidfFitter(min_df=0),
        lambda: TfidfFitter(max_features=0),
        lambda: HashingTextVectorizer(0),
        lambda: HashingTextVectorizer(2**31),
        lambda: PythonSourceVectorizer(0),
    ],
)
def test_bad_settings(make):
    with pytest.raises(ConfigError, match="must be"):
        make()


def test_no_words_left():
    with pytest.raises(DataError, match="at least one word in 2 or more"):
        fitted(["one", "two"], min_df=2)
