from __future__ import annotations

import pytest

from slidex.errors import ConfigError
from slidex.lsh import index_settings, make_index
from slidex.lsh.family import MAX_BITS
from slidex.train import search_space as module
from slidex.train.search_space import MOST_GRAPH_CLASSES, MOST_TABLE_BYTES, search_space

SIZES = (2, 40, 3_000, 283_447, 3_443_576, 100_000_000)


@pytest.mark.parametrize("num_classes", SIZES)
def test_every_setting_is_one_of_the_index_and_in_range(num_classes):
    space = search_space(num_classes, ("simhash", "learned", "faiss-ivf", "faiss-pq", "faiss-hnsw"))
    for name, options in space:
        assert options.keys() <= index_settings(name).keys()
        assert options.get("bits", 1) <= MAX_BITS
        assert 1 <= options.get("nprobe", 1) <= num_classes
    assert len({(name, str(options)) for name, options in space}) == len(space)
    for name, options in space:
        if num_classes < 10_000 and not name.startswith("faiss"):
            make_index(name, 8, num_classes, **options)


def test_tables_beyond_the_memory_are_left_out():
    most = {size: max(o["tables"] for _, o in search_space(size, ("simhash",))) for size in SIZES[:-1]}
    assert most[283_447] == 64
    assert most[3_443_576] == 32
    assert all(6 * size * tables <= MOST_TABLE_BYTES for size, tables in most.items())


@pytest.mark.parametrize("installed", [False, True])
def test_faiss_is_tried_where_it_is_installed_and_graphs_where_they_are_quick(monkeypatch, installed):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda _: object() if installed else None)

    def names(num_classes: int) -> set[str]:
        return {name for name, _ in search_space(num_classes, None)}

    own = {"simhash", "learned"}
    assert names(1_000) == own | ({"faiss-ivf", "faiss-pq", "faiss-hnsw"} if installed else set())
    assert names(MOST_GRAPH_CLASSES + 1) == own | ({"faiss-ivf", "faiss-pq"} if installed else set())


def test_an_index_without_settings_here_has_its_defaults():
    assert search_space(100, ("exact", "dwta")) == [("exact", {}), ("dwta", {})]


def test_nothing_to_try_is_refused():
    with pytest.raises(ConfigError, match="'indexes' parameter of tune-index must name an index"):
        search_space(100, ())
    with pytest.raises(ConfigError, match="none that fits"):
        search_space(100_000_000, ("simhash",))
