"""Python source: the tokenizer against the standard library's, the features' honesty, the data set's counts."""

from __future__ import annotations

import io
import keyword
import tokenize
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidex.data import python_source
from slidex.data.python_source import CONTEXT_FILE, prepare_python_source, standard_library_directory
from slidex.data.python_tokens import TokenTable, UntokenisableError, context_features, is_name, tokenise
from slidex.data.vectorizers import load_vectorizer
from slidex.errors import ConfigError, DataError

WIDTH = 1 << 20
MODULES = ("argparse.py", "ast.py", "json/decoder.py", "difflib.py", "tokenize.py", "typing.py")

SOURCE = '''\
"""Docs with a 'quote' and words."""
import os  # a comment with words

def area(width, height=0x1F):
    rb"bytes" f"text"
    total = (width *
             height)

    return total ** .5e-3 if width else match(total)[os.path]
'''


def names_by_tokenize(text):
    """Names outside f-strings: since 3.12 tokenize looks into them, while slidex takes each as one token."""
    start, end = getattr(tokenize, "FSTRING_START", None), getattr(tokenize, "FSTRING_END", None)
    names, depth = [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        depth += (token.type == start) - (token.type == end)
        if token.type == tokenize.NAME and depth == 0 and not keyword.iskeyword(token.string):
            names.append(token.string)
    return names


def names_of(text):
    table = TokenTable()
    tokens = tokenise(text, table)
    text_of = table.names()
    return [text_of[token] for token in tokens[is_name(tokens)].tolist()]


def library_file(name):
    with tokenize.open(standard_library_directory() / name) as file:
        return file.read()


def test_identifiers_of_a_source():
    assert names_of(SOURCE) == names_by_tokenize(SOURCE)
    assert names_of(SOURCE)[-6:] == ["total", "width", "match", "total", "os", "path"]


@pytest.mark.parametrize("module", MODULES)
def test_identifiers_equal_the_standard_tokenizers(module):
    text = library_file(module)
    assert names_of(text) == names_by_tokenize(text)


@pytest.mark.parametrize(
    "text", ["a = 'b\n", 'a = """b\n', "a = `b`\n", "f(a\n", "a)\n", ")(\n", "a ? b\n", "a \\ b\n", "a$b\n"]
)
def test_broken_source_is_refused_but_a_snippet_is_read(text):
    with pytest.raises(UntokenisableError):
        tokenise(text, TokenTable())
    assert is_name(tokenise(text, TokenTable(), partial=True)).any() == ("a" in text)


def test_comments_blank_lines_and_joined_lines_change_nothing():
    plain = "if a:\n    b = f(c, d)\n"
    noisy = "# x\n\nif a: # y z\n\n  # w\n    b = f(c, \n# v\n\n   d)\n"
    table = TokenTable()
    np.testing.assert_array_equal(tokenise(plain, table), tokenise(noisy, table))
    assert not np.array_equal(tokenise(plain, table), tokenise(plain.replace("    ", "  "), table))


def test_tokens_do_not_depend_on_the_process():
    tokens = tokenise("spam = eggs(1, 'x')\n", TokenTable())
    assert tokens[1:4].tolist() == [12534991609212061610, 2077947541310762897, 9234279150165364818]
    ids = context_features(tokens, np.array([3]), 2**17)[1]
    assert ids.tolist() == [13211, 29986, 32014, 33613, 43321, 48894, 88620, 108779, 123415]


code = st.lists(
    st.sampled_from(["a", "b", "self", ".", "(", ")", "[", "]", ",", "=", "if", "'s'", "1", "\n", "\n    "]),
    max_size=60,
).map(" ".join)


@given(before=code, after=code)
@settings(max_examples=50, deadline=None, derandomize=True)
def test_features_look_only_at_what_stands_before(before, after):
    table = TokenTable()
    whole, snippet = (tokenise(t, table, partial=True) for t in (f"{before} a {after}", before))
    positions = np.flatnonzero(is_name(whole))
    indptr, indices = context_features(whole, positions, WIDTH)
    assert len(indptr) == len(positions) + 1
    for row, position in enumerate(positions):
        ids = indices[indptr[row] : indptr[row + 1]]
        assert (np.diff(ids) > 0).all()
        assert len(ids) > 0
        assert ids[0] >= 0
        assert ids[-1] < WIDTH
        alone = context_features(whole[:position], np.array([position]), WIDTH)[1]
        np.testing.assert_array_equal(ids, alone)
    ending = context_features(snippet, np.array([len(snippet)]), WIDTH)[1]
    assert len(ending) > 0


def feature_set(text):
    tokens = tokenise(text, TokenTable(), partial=True)
    return set(context_features(tokens, np.array([len(tokens)]), WIDTH)[1].tolist())


def test_each_kind_of_context_counts():
    base = "import os\nfirst(1)\ncount = spam(eggs, 1, 2, 3, 4, 5, 6, "
    for other in (
        base.replace("eggs", "ham"),  # the bag of recent identifiers
        base.replace("spam", "ham"),  # the function called
        base.replace("1, 2", "1 + 2"),  # the number of the argument
        base.replace("6, ", "6 + "),  # the last token
        base.replace("count =", "return"),  # the start of the statement
    ):
        assert feature_set(other) != feature_set(base)
    # What followed the same tokens earlier in the file, far out of the bag's reach.
    far = "x = 1\n" * 40
    assert feature_set("y.alpha\n" + far + "z = y.") != feature_set("y.beta\n" + far + "z = y.")


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        path = tmp_path / "code" / ("pkg" if i % 2 else ".") / f"m{i}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"import shared\nfor item in shared.values(only{i}):\n    shared.call(item)\n" * 2)
    (tmp_path / "code" / "bad.py").write_text("a = (\n")
    (tmp_path / "code" / "latin.py").write_bytes(b"a = '\xe9'\n")
    (tmp_path / "code" / "note.txt").write_text("not Python")
    installed = tmp_path / "code" / "site-packages" / "other.py"
    installed.parent.mkdir()
    installed.write_text("never = seen\n" * 9)
    return tmp_path / "code"


def test_prepared_rows(folder, tmp_path):
    data = prepare_python_source([folder], tmp_path / "d", test_fraction=0.4, valid_fraction=0.2, seed=1)
    data.verify()
    files, extra = data.meta["extra"]["files"], data.meta["extra"]
    assert files["train"] + files["valid"] + files["test"] == 12
    assert min(files.values()) > 0
    assert list(data.label_names()) == ["call", "item", "shared", "values"]  # onlyN: twice each
    assert extra["skipped_files"] == {"untokenisable": 1, "undecodable": 1}
    assert extra["skipped_file_names"] == ["bad.py", "latin.py"]
    for name in data.splits:
        split = data.split(name)
        assert split.num_rows == files[name] * 2 * 7
        assert extra[f"{name}_positions_outside_vocabulary"] == files[name] * 2
        expected = {"shared": 6, "item": 4, "values": 2, "call": 2}
        labels = Counter(data.label_names()[c] for c in split.y.indices)
        assert labels == {label: files[name] * n for label, n in expected.items()}
        assert np.load(split_file(data, name)).shape == (split.num_rows, 2)
    assert sorted(path.name for path in data.path.iterdir()) == [
        *("labels.jsonl", "meta.json", "test", "train", "valid", "vectorizer")
    ]


def split_file(data, name):
    return data.path / name / CONTEXT_FILE


def test_a_prediction_sees_what_training_saw(tmp_path):
    text = "import os\n\ndef f(path):\n    return os.path.join(path, os.sep)\n"
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text(text)
    data = prepare_python_source([tmp_path / "code"], tmp_path / "d", min_count=1, test_fraction=0.0)
    before = [text[: at + len(word)] for word in ("os.", "os.path.", "join(") for at in [text.index(word)]]
    got = load_vectorizer(data.path / "vectorizer").transform(before)
    split, names = data.split("train"), data.label_names()
    answers = [names[c] for c in split.y.indices]
    rows = [answers.index("path", 3), answers.index("join"), answers.index("join") + 1]
    expected = split.x.take(np.array(rows))
    np.testing.assert_array_equal(got.indptr, expected.indptr)
    np.testing.assert_array_equal(got.indices, expected.indices)


def test_context_file_holds_the_two_tokens_before(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("a.b.a.b\n")
    data = prepare_python_source([tmp_path / "code"], tmp_path / "d", min_count=1, test_fraction=0.0)
    context = np.load(split_file(data, "train"))
    tokens = tokenise("a.b.a.b\n", TokenTable())
    upper = [0, *(tokens >> np.uint64(32)).astype(np.uint32).view(np.int32).tolist()]
    assert context.tolist() == [[upper[i], upper[i + 1]] for i in (0, 2, 4, 6)]


def test_preparing_twice_gives_the_same_files(folder, tmp_path):
    for i, path in enumerate(sorted(folder.glob("m*.py"))):
        path.write_text(path.read_text() + "more.lines\n" * i)
    a, b, c = (
        prepare_python_source([folder], tmp_path / name, test_fraction=0.5, seed=seed).meta["files"]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert a == b
    assert a != c


def test_files_are_read_in_the_order_of_their_names(tmp_path):
    (tmp_path / "code" / "pkg").mkdir(parents=True)
    for name in ("z", "pkg/b", "a"):
        (tmp_path / "code" / f"{name}.py").write_text(f"{name[-1]}\n")
    data = prepare_python_source([tmp_path / "code"], tmp_path / "d", min_count=1, test_fraction=0.0)
    assert [data.label_names()[c] for c in data.split("train").y.indices] == ["a", "b", "z"]


def test_where_the_folder_stands_does_not_matter(folder, tmp_path):
    a = prepare_python_source([folder], tmp_path / "a").meta["files"]
    moved = folder.rename(tmp_path / "elsewhere")
    assert prepare_python_source([moved], tmp_path / "b").meta["files"] == a


def test_max_files(folder, tmp_path):
    data = prepare_python_source([folder], tmp_path / "d", max_files=5, test_fraction=0.0, min_count=1)
    assert data.meta["extra"]["files"]["train"] + sum(data.meta["extra"]["skipped_files"].values()) == 5


def test_nothing_half_written(folder, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(python_source, "context_features", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare_python_source([folder], tmp_path / "d")
    assert [path.name for path in tmp_path.iterdir()] == ["code"]


def test_bad_folders(folder, tmp_path):
    with pytest.raises(DataError, match="expected a directory"):
        prepare_python_source([tmp_path / "none"], tmp_path / "d")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"at least one \.py file"):
        prepare_python_source([tmp_path / "empty"], tmp_path / "d")
    with pytest.raises(DataError, match="seen 1000 or more times"):
        prepare_python_source([folder], tmp_path / "d", min_count=1000)
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "options", [{"min_count": 0}, {"max_files": 0}, {"test_fraction": 1.0}, {"num_features": 0}]
)
def test_bad_settings(folder, tmp_path, options):
    with pytest.raises(ConfigError, match="must"):
        prepare_python_source([folder], tmp_path / "d", **options)
    with pytest.raises(ConfigError, match="directories"):
        prepare_python_source([], tmp_path / "d")


def test_progress_reaches_the_end(folder, tmp_path):
    seen = []
    data = prepare_python_source([folder], tmp_path / "d", progress=lambda **now: seen.append(now))
    assert seen[-1]["bytes_done"] == seen[-1]["bytes_total"]
    assert seen[-1]["rows"] == sum(data.meta["splits"][name]["rows"] for name in data.splits)


def test_the_standard_library_is_there():
    assert (standard_library_directory() / "os.py").is_file()
    assert isinstance(standard_library_directory(), Path)
