"""Text in, sparse rows out: the vectorisers a data set keeps so that new text is treated as its own was.

A vectoriser is saved as JSON and ``.npy`` files, never as a pickle, so that a data set from a stranger cannot
run code. Words, counts and hashes are scikit-learn's; what is added here is fitting tf-idf on a stream
(scikit-learn wants all documents at once) and putting it back together from a file. scikit-learn takes a second to
import and training needs none of it, so it is imported where a text vectoriser is made.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import numpy as np
from scipy.sparse import csr_matrix

from slidex.data.csr import CsrArrays
from slidex.data.python_tokens import TokenTable, context_features, tokenise
from slidex.errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sklearn.feature_extraction.text import HashingVectorizer, TfidfVectorizer

_SETTINGS, _VOCABULARY, _IDF = "vectorizer.json", "vocabulary.json", "idf.npy"
_MAX_WIDTH = 2**31 - 1


class Vectorizer(Protocol):
    """Turns texts into sparse rows.

    Attributes:
        kind: Name in ``meta.json`` and ``vectorizer.json``.
        num_features: Width of the rows.
    """

    kind: ClassVar[str]

    @property
    def num_features(self) -> int:
        """Width of the rows."""
        ...

    def transform(self, texts: Sequence[str]) -> CsrArrays:
        """One row for each text."""
        ...

    def save(self, directory: str | Path) -> None:
        """Write everything `load_vectorizer` needs into an existing or new directory."""
        ...


class TfidfTextVectorizer:
    """scikit-learn's tf-idf with logarithmic counts and rows of length 1.

    Args:
        vocabulary: Terms in the order of their feature ids.
        idf: float (terms,), inverse document frequencies.
        ngram_range: Shortest and longest n-gram of words.
    """

    kind: ClassVar[str] = "tfidf"

    def __init__(self, vocabulary: Sequence[str], idf: np.ndarray, ngram_range: tuple[int, int]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: PLC0415

        self._vocabulary = list(vocabulary)
        self._idf = np.asarray(idf, dtype=np.float64)
        self._ngram_range = ngram_range
        self._model = TfidfVectorizer(
            vocabulary={term: i for i, term in enumerate(self._vocabulary)},
            ngram_range=ngram_range,
            sublinear_tf=True,
            dtype=np.float32,
        )
        self._model.idf_ = self._idf

    @property
    def num_features(self) -> int:
        """Number of terms."""
        return len(self._vocabulary)

    @property
    def vocabulary(self) -> list[str]:
        """Terms in the order of their feature ids."""
        return self._vocabulary

    def transform(self, texts: Sequence[str]) -> CsrArrays:
        """One row for each text; a text of unknown terms gives an empty row."""
        return _rows(self._model, texts, self.num_features)

    def save(self, directory: str | Path) -> None:
        """Write settings, terms and inverse document frequencies."""
        folder = _write_settings(directory, {"kind": self.kind, "ngram_range": list(self._ngram_range)})
        (folder / _VOCABULARY).write_text(json.dumps(self._vocabulary), encoding="ascii")
        np.save(folder / _IDF, self._idf, allow_pickle=False)

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> Self:
        """Read what `save` wrote; `load_vectorizer` calls this."""
        vocabulary = _read_json(folder / _VOCABULARY, list)
        if not all(isinstance(term, str) for term in vocabulary) or len(set(vocabulary)) != len(vocabulary):
            raise DataError("expected a list of different strings", path=folder / _VOCABULARY)
        try:
            idf = np.load(folder / _IDF, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"expected a .npy array: {error}", path=folder / _IDF) from error
        if idf.dtype != np.float64 or idf.shape != (len(vocabulary),) or not np.isfinite(idf).all():
            raise DataError(
                f"expected {len(vocabulary)} finite float64 values, found {idf.dtype} {idf.shape}",
                path=folder / _IDF,
            )
        return cls(vocabulary, idf, _ngram_range_of(settings, folder))


class TfidfFitter:
    """Counts documents per term over a stream, then makes a `TfidfTextVectorizer`.

    Memory grows with the number of different terms, not of documents.

    Args:
        ngram_range: Shortest and longest n-gram of words.
        min_df: Terms in fewer documents than this are dropped.
        max_features: Keep this many terms, those in the most documents (ties: alphabetically first); None
            keeps all. (scikit-learn ranks by occurrences instead.)

    Raises:
        ConfigError: A setting is out of range.
    """

    def __init__(
        self, ngram_range: tuple[int, int] = (1, 1), min_df: int = 1, max_features: int | None = None
    ) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer  # noqa: PLC0415

        self._ngram_range = check_ngram_range(ngram_range, "TfidfFitter")
        self._min_df = _check_positive("min_df", min_df, "TfidfFitter")
        self._max_features = max_features
        if max_features is not None:
            _check_positive("max_features", max_features, "TfidfFitter")
        self._analyze = TfidfVectorizer(ngram_range=ngram_range).build_analyzer()
        self._documents = 0
        self._frequencies: Counter[str] = Counter()

    def add(self, texts: Iterable[str]) -> None:
        """Count more documents."""
        for text in texts:
            self._documents += 1
            self._frequencies.update(set(self._analyze(text)))

    def finish(self) -> TfidfTextVectorizer:
        """The vectoriser of everything added.

        Raises:
            DataError: No term is left.
        """
        terms = [(-count, term) for term, count in self._frequencies.items() if count >= self._min_df]
        if not terms:
            raise DataError(
                f"expected at least one word in {self._min_df} or more training texts, found none "
                f"in {self._documents} texts"
            )
        vocabulary = sorted(term for _, term in sorted(terms)[: self._max_features])
        counts = np.array([self._frequencies[term] for term in vocabulary], dtype=np.float64)
        return TfidfTextVectorizer(
            vocabulary, np.log((1 + self._documents) / (1 + counts)) + 1.0, self._ngram_range
        )


class HashingTextVectorizer:
    """scikit-learn's feature hashing of word counts, rows of length 1; nothing to fit, nothing to store.

    Args:
        num_features: Width of the hashed space.
        ngram_range: Shortest and longest n-gram of words.
    """

    kind: ClassVar[str] = "hashing"

    def __init__(self, num_features: int = 2**18, ngram_range: tuple[int, int] = (1, 1)) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer  # noqa: PLC0415

        self._num_features = _check_width(num_features, "HashingTextVectorizer")
        self._ngram_range = check_ngram_range(ngram_range, "HashingTextVectorizer")
        self._model = HashingVectorizer(
            n_features=num_features, ngram_range=ngram_range, alternate_sign=False, dtype=np.float32
        )

    @property
    def num_features(self) -> int:
        """Width of the hashed space."""
        return self._num_features

    def transform(self, texts: Sequence[str]) -> CsrArrays:
        """One row for each text."""
        return _rows(self._model, texts, self.num_features)

    def save(self, directory: str | Path) -> None:
        """Write the settings."""
        _write_settings(
            directory,
            {"kind": self.kind, "num_features": self.num_features, "ngram_range": list(self._ngram_range)},
        )

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> Self:
        """Read what `save` wrote; `load_vectorizer` calls this."""
        return cls(_width_of(settings, folder), _ngram_range_of(settings, folder))


class PythonSourceVectorizer:
    """Features of the identifier that comes next after a piece of Python source.

    Args:
        num_features: Width of the hashed space.
    """

    kind: ClassVar[str] = "python-source"

    def __init__(self, num_features: int) -> None:
        self._num_features = _check_width(num_features, "PythonSourceVectorizer")
        self._tokens = TokenTable()

    @property
    def num_features(self) -> int:
        """Width of the hashed space."""
        return self._num_features

    def transform(self, texts: Sequence[str]) -> CsrArrays:
        """One row for each snippet: the features of the position after its end.

        The snippet may begin and end anywhere between two tokens; the more of the file it holds, the better.
        """
        indptr, parts = np.zeros(len(texts) + 1, dtype=np.int64), [np.zeros(0, dtype=np.int32)]
        for row, text in enumerate(texts):
            tokens = tokenise(text.replace("\r\n", "\n"), self._tokens, partial=True)
            end = np.array([len(tokens)], dtype=np.int64)
            parts.append(context_features(tokens, end, self.num_features)[1])
            indptr[row + 1] = indptr[row] + len(parts[-1])
        return CsrArrays(indptr, np.concatenate(parts), None, self.num_features)

    def save(self, directory: str | Path) -> None:
        """Write the settings."""
        _write_settings(directory, {"kind": self.kind, "num_features": self.num_features})

    @classmethod
    def load(cls, folder: Path, settings: dict[str, Any]) -> Self:
        """Read what `save` wrote; `load_vectorizer` calls this."""
        return cls(_width_of(settings, folder))


_KINDS = {kind.kind: kind for kind in (TfidfTextVectorizer, HashingTextVectorizer, PythonSourceVectorizer)}


def load_vectorizer(directory: str | Path) -> Vectorizer:
    """Read a vectoriser back.

    Args:
        directory: Where `Vectorizer.save` wrote: the ``vectorizer`` folder of a data set.

    Raises:
        DataError: A file is missing or malformed, or the kind is unknown.
    """
    folder = Path(directory)
    settings = _read_json(folder / _SETTINGS, dict)
    kind = settings.get("kind")
    if kind not in _KINDS:
        raise DataError(
            f'expected "kind" to be one of {", ".join(_KINDS)}, found {kind!r}', path=folder / _SETTINGS
        )
    return _KINDS[kind].load(folder, settings)


def _rows(model: TfidfVectorizer | HashingVectorizer, texts: Sequence[str], width: int) -> CsrArrays:
    # scikit-learn refuses to transform no texts.
    return CsrArrays.from_scipy(
        csr_matrix(model.transform(texts) if len(texts) else (0, width), dtype=np.float32)
    )


def check_ngram_range(value: tuple[int, int], caller: str) -> tuple[int, int]:
    """Return ``value`` if it is a pair of integers with 1 <= shortest <= longest; else raise ConfigError."""
    if not (len(value) == 2 and all(type(n) is int for n in value) and 1 <= value[0] <= value[1]):
        raise ConfigError(
            f"The 'ngram_range' parameter of {caller} must be two integers, 1 <= shortest <= longest. "
            f"Got {value!r} instead."
        )
    return value


def _check_positive(name: str, value: int, caller: str) -> int:
    if type(value) is not int or value < 1:
        raise ConfigError(
            f"The {name!r} parameter of {caller} must be an integer of 1 or more. Got {value!r} instead."
        )
    return value


def _check_width(value: int, caller: str) -> int:
    if type(value) is not int or not 1 <= value <= _MAX_WIDTH:
        raise ConfigError(
            f"The 'num_features' parameter of {caller} must be an integer in [1, {_MAX_WIDTH}]. "
            f"Got {value!r} instead."
        )
    return value


def _write_settings(directory: str | Path, settings: dict[str, Any]) -> Path:
    folder = Path(directory)
    folder.mkdir(exist_ok=True)
    (folder / _SETTINGS).write_text(json.dumps(settings) + "\n", encoding="ascii")
    return folder


def _read_json(path: Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError("expected a file of a vectoriser, found none", path=path) from None
    except ValueError as error:
        raise DataError(f"expected JSON: {error}", path=path) from error
    if not isinstance(value, kind):
        raise DataError(f"expected a JSON {kind.__name__}, found {type(value).__name__}", path=path)
    return value


def _width_of(settings: dict[str, Any], folder: Path) -> int:
    width = settings.get("num_features")
    if type(width) is not int or not 1 <= width <= _MAX_WIDTH:
        raise DataError(
            f'expected "num_features" in [1, {_MAX_WIDTH}], found {width!r}', path=folder / _SETTINGS
        )
    return width


def _ngram_range_of(settings: dict[str, Any], folder: Path) -> tuple[int, int]:
    value = settings.get("ngram_range")
    try:
        return check_ngram_range(tuple(value), "a vectoriser")  # pyrefly: ignore
    except (TypeError, ConfigError):
        raise DataError(
            f'expected "ngram_range" to be two integers, found {value!r}', path=folder / _SETTINGS
        ) from None
