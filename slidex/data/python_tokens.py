"""Python source as integers: a fast tokenizer, and the features of the identifier that comes next.

The standard library's `tokenize` is exact but reads 5 MB/s; one regular expression whose matches are looked up
in a dictionary reads 15 MB/s and knows all that is needed here: which tokens are identifiers, brackets and
ends of logical lines. Training rows and predictions come from the same kernel, `_context_features`, so that
they cannot drift apart. Tokens are 64-bit hashes of their text and never Python's salted ``hash``: features are
the same in every process, on every machine.
"""

from __future__ import annotations

import hashlib
import keyword
import re

import numba
import numpy as np

# The three low bits of a token say what it is; the other bits are the hash of its text.
_KIND_BITS = 7
_SKIP, _PLAIN, _NAME, _OPEN, _CLOSE, _NEWLINE, _BROKEN = range(7)

_ORDERS = 5  # contexts of 1.._ORDERS tokens are looked up earlier in the file
_FOLLOWERS = 3  # different identifiers taken from each
_LOOKBACK = 12  # earlier places visited for them
_SLOTS = 1 << 13  # of the table of the last place of each context; a collision only hides a place
_POSITIONS = 6
_BAG = 12
_MAX_FEATURES = _POSITIONS + 3 + 3 + 3 + _ORDERS * _FOLLOWERS + 1 + _BAG
# What a hash stands for: numbers that keep the kinds of features apart.
_AT, _NGRAM, _CALLEE, _STATEMENT, _FOLLOWER, _BEST, _RECENT = range(0, 700, 100)
_FIRST_ARGUMENT = 1000

_TOKEN = re.compile(
    r"""
    (?:[rbftuRBFTU]{1,2})?(?:
        \"{3} (?:[^"\\]|\\.|"(?!""))*+ \"{3}
      | '{3}  (?:[^'\\]|\\.|'(?!''))*+ '{3}
      | "(?:[^"\\\n]|\\.)*+"
      | '(?:[^'\\\n]|\\.)*+'
    )
  | [^\W\d]\w*
  | \.?\d[\w.]*(?:(?<=[eE])[+-]\d+)?
  | \#[^\n]*
  | \\\n
  | \n[ \t\f]*
  | \*\*=? | //=? | >>=? | <<=? | -> | := | \.\.\. | [!=<>+\-*/%&|^@]= | \S
    """,
    re.VERBOSE | re.DOTALL,
)


class TokenTable(dict):
    """Token of a piece of text; a dictionary, so that the lookup of a known piece costs no Python call.

    Only names, operators and line ends are kept as keys: strings, numbers and comments are too many and all
    share one token per sort.
    """

    def __missing__(self, text: str) -> int:
        """Compute, and for names and operators keep, the token of ``text``: an int in ``[0, 2**64)``."""
        first = text[0]
        if first in "#\\":
            return _SKIP if len(text) > 1 or first == "#" else _BROKEN
        if len(text) > 1 and text[-1] in "\"'":
            return self['""'] if text != '""' else self._keep(text, _PLAIN)
        if first.isdigit() or (first == "." and text[1:2].isdigit()):
            return self["0"] if text != "0" else self._keep(text, _PLAIN)
        if first == "\n":
            return self._keep(text, _NEWLINE)
        if text.isidentifier():
            return self._keep(text, _PLAIN if keyword.iskeyword(text) else _NAME)
        if first in "([{":
            return self._keep(text, _OPEN)
        if first in ")]}":
            return self._keep(text, _CLOSE)
        return self._keep(text, _PLAIN if first in ",:;.@=+-*/%&|^~<>" or text == "!=" else _BROKEN)

    def _keep(self, text: str, kind: int) -> int:
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        token = int.from_bytes(digest, "little") & ~_KIND_BITS | kind
        self[text] = token
        return token

    def names(self) -> dict[int, str]:
        """Text of every identifier seen so far, by its token."""
        return {token: text for text, token in self.items() if token & _KIND_BITS == _NAME}


class UntokenisableError(ValueError):
    """The text is not whole, balanced Python source."""


def tokenise(text: str, table: TokenTable, *, partial: bool = False) -> np.ndarray:
    r"""The tokens of a piece of Python source: uint64 (tokens,), without comments and blank lines.

    Args:
        text: Source with ``\n`` line ends. An f-string is one token, as it was before Python 3.12.
        table: Dictionary of tokens, extended here.
        partial: Accept a snippet: brackets may be open or closed alone, pieces that are no token are dropped.

    Raises:
        UntokenisableError: Unless `partial`, for a stray character or string quote, or unbalanced brackets.
    """
    pieces = _TOKEN.findall("\n" + text)
    raw = np.fromiter(map(table.__getitem__, pieces), np.uint64, len(pieces))
    broken = (raw & np.uint64(_KIND_BITS)) == _BROKEN
    if broken.any() and not partial:
        raise UntokenisableError(f"stray {pieces[int(broken.argmax())]!r}")
    tokens, balanced = _clean(raw[~broken])
    if not balanced and not partial:
        raise UntokenisableError("unbalanced brackets")
    return tokens


@numba.njit(cache=True, nogil=True)
def _clean(raw):
    """Drop comments, line ends inside brackets, and all but the last of consecutive line ends."""
    kept = np.empty_like(raw)
    count = depth = 0
    balanced = True
    for token in raw:
        kind = token & np.uint64(_KIND_BITS)
        if kind == _SKIP or (kind == _NEWLINE and depth > 0):
            continue
        if kind == _OPEN:
            depth += 1
        elif kind == _CLOSE:
            balanced &= depth > 0
            depth = max(depth - 1, 0)
        elif kind == _NEWLINE and count > 0 and kept[count - 1] & np.uint64(_KIND_BITS) == _NEWLINE:
            count -= 1
        kept[count] = token
        count += 1
    return kept[:count].copy(), balanced and depth == 0


def is_name(tokens: np.ndarray) -> np.ndarray:
    """Which tokens are identifiers that are no keywords: bool, the shape of ``tokens``."""
    return (tokens & np.uint64(_KIND_BITS)) == _NAME


_COMMA = np.uint64(TokenTable()[","])


def context_features(
    tokens: np.ndarray, positions: np.ndarray, num_features: int
) -> tuple[np.ndarray, np.ndarray]:
    """Hashed features of what stands before each position of one file.

    They are: the last 6 tokens by position; the last 2, 3 and 4 together; the function being called, with the
    number of the argument and with the last token; the first tokens of the statement; the identifiers that
    followed the same last 1 to 5 tokens earlier in the file, and the one after the most of them; the last 12
    identifiers in any order.

    Args:
        tokens: uint64 (tokens,), one file or snippet, from `tokenise`.
        positions: int64 (rows,), strictly increasing, each in ``[0, len(tokens)]``; the token at the position
            itself and those after it are never looked at.
        num_features: Width of the hashed space.

    Returns:
        int64 (rows + 1,) offsets and int32 (nnz,) feature ids, strictly increasing within each row.
    """
    return _context_features(tokens, positions, num_features)


@numba.njit(cache=True, nogil=True)
def _mix(a, b):
    """A hash of two 64-bit words: multiply and shift as in splitmix64's finaliser."""
    z = (a ^ (np.uint64(b) * np.uint64(0x9E3779B97F4A7C15))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(32))


@numba.njit(cache=True, nogil=True)
def _context_features(tokens, positions, num_features):
    length = len(tokens)
    indptr = np.zeros(len(positions) + 1, np.int64)
    indices = np.empty(len(positions) * _MAX_FEATURES, np.int32)
    hashes = np.empty(_MAX_FEATURES, np.uint64)
    names = np.empty(length + 1, np.int64)  # places of the identifiers so far
    opened = np.empty(length + 1, np.int64)  # places of the open brackets
    commas = np.empty(length + 1, np.int64)  # how many commas so far in each
    latest = np.full((_ORDERS, _SLOTS), -1, np.int64)  # last identifier after a context
    earlier = np.empty((_ORDERS, length + 1), np.int64)  # the identifier after the same context before
    num_names = depth = statement = row = at = 0
    for i in range(length + 1):
        if row == len(positions):
            break
        if positions[row] == i:
            n = _add_local(tokens, i, statement, hashes)
            n = _add_call(tokens, i, opened, commas, depth, hashes, n)
            n = _add_followers(tokens, i, latest, earlier, hashes, n)
            for nth in range(max(0, num_names - _BAG), num_names):
                hashes[n] = _mix(tokens[names[nth]], _RECENT)
                n += 1
            at = _append_row(hashes, n, num_features, indices, at)
            row += 1
            indptr[row] = at
        if i == length:
            break
        kind = tokens[i] & np.uint64(_KIND_BITS)
        if kind == _NAME:
            _remember(tokens, i, latest, earlier)
            names[num_names] = i
            num_names += 1
        elif kind == _OPEN:
            opened[depth] = i
            commas[depth] = 0
            depth += 1
        elif kind == _CLOSE:
            depth = max(0, depth - 1)
        elif kind == _NEWLINE:
            statement = i + 1
        elif depth > 0 and tokens[i] == _COMMA:
            commas[depth - 1] += 1
    return indptr, indices[:at].copy()


@numba.njit(cache=True, nogil=True)
def _add_local(tokens, i, statement, hashes):
    """Last tokens by position, n-grams of them, and the start of the statement."""
    n = 0
    key = np.uint64(_NGRAM)
    for back in range(1, min(i, _POSITIONS) + 1):
        token = tokens[i - back]
        hashes[n] = _mix(token, _AT + back)
        n += 1
        if back <= 4:
            key = _mix(key, token)
            if back >= 2:
                hashes[n] = key
                n += 1
    if statement < i:
        start = _mix(tokens[statement], _STATEMENT)
        hashes[n] = start
        hashes[n + 1] = _mix(start, tokens[i - 1])
        n += 2
        if statement + 1 < i:
            hashes[n] = _mix(_mix(start, 1), tokens[statement + 1])
            n += 1
    return n


@numba.njit(cache=True, nogil=True)
def _add_call(tokens, i, opened, commas, depth, hashes, n):
    """What stands before the innermost open bracket, with the argument's number and with the last token."""
    if depth == 0 or opened[depth - 1] == 0:
        return n
    callee = _mix(tokens[opened[depth - 1] - 1], _CALLEE)
    hashes[n] = callee
    hashes[n + 1] = _mix(callee, _FIRST_ARGUMENT + commas[depth - 1])
    hashes[n + 2] = _mix(callee, tokens[i - 1])
    return n + 3


@numba.njit(cache=True, nogil=True)
def _add_followers(tokens, i, latest, earlier, hashes, n):
    """The latest different identifiers that followed the same last tokens earlier in the file.

    Looking them up lets a model copy names it has never been trained on at this place.
    """
    key = np.uint64(0)
    best = np.uint64(0)
    for order in range(min(i, _ORDERS)):
        key = _mix(key, tokens[i - 1 - order])
        place = latest[order, key & np.uint64(_SLOTS - 1)]
        first = n
        if place >= 0 and tokens[place - 1] == tokens[i - 1]:
            best = tokens[place]
        for _ in range(_LOOKBACK):
            if place < 0 or n == first + _FOLLOWERS:
                break
            hashed = _mix(tokens[place], _FOLLOWER + order)
            known = tokens[place - 1] != tokens[i - 1]  # another context in the same slot
            for other in range(first, n):
                known |= hashes[other] == hashed
            if not known:
                hashes[n] = hashed
                n += 1
            place = earlier[order, place]
    if best != 0:
        hashes[n] = _mix(best, _BEST)
        n += 1
    return n


@numba.njit(cache=True, nogil=True)
def _remember(tokens, i, latest, earlier):
    """Enter the identifier at ``i`` as the latest after each of its contexts."""
    key = np.uint64(0)
    for order in range(min(i, _ORDERS)):
        key = _mix(key, tokens[i - 1 - order])
        slot = key & np.uint64(_SLOTS - 1)
        earlier[order, i] = latest[order, slot]
        latest[order, slot] = i


@numba.njit(cache=True, nogil=True)
def _append_row(hashes, count, num_features, indices, first):
    """Write the ids of a row, sorted and without repeats; returns the end of the row."""
    end = first
    for k in range(count):
        feature = np.int32(hashes[k] % np.uint64(num_features))
        place = end
        while place > first and indices[place - 1] > feature:
            place -= 1
        if place > first and indices[place - 1] == feature:
            continue
        for moved in range(end, place, -1):
            indices[moved] = indices[moved - 1]
        indices[place] = feature
        end += 1
    return end
