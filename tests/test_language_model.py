"""The benchmark of language models: its text, windows and arithmetic on cases whose answer is known."""

from __future__ import annotations

import importlib
import itertools
import lzma
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
WORDS = 40


@pytest.fixture(autouse=True)
def _importable(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def text8():
    return importlib.import_module("benchmarks.text8")


@pytest.fixture
def language_model():
    return importlib.import_module("benchmarks.language_model")


@pytest.fixture
def small_text(text8):
    """A text in which every word says the next: 0, 1, ..., 39, 0, 1, ..."""
    return text8.split(np.arange(4000, dtype=np.int32) % WORDS, 3000)


@pytest.mark.parametrize("piece", [1, 3, 7, 1000])
def test_words_are_numbered_by_first_occurrence_however_the_file_is_cut(
    text8, tmp_path, monkeypatch, piece
) -> None:
    path = tmp_path / "text.xz"
    path.write_bytes(lzma.compress(b" the cat saw  the dog saw a cat"))
    monkeypatch.setattr(text8, "PIECE", piece)
    assert text8.word_ids(path).tolist() == [0, 1, 2, 0, 3, 2, 4, 1]


def test_ids_go_by_frequency_in_the_training_part_alone(text8) -> None:
    text = text8.split(np.array([0, 1, 2, 2, 1, 2, 3, 3, 3, 3, 0]), 6)
    assert text.train.tolist() == [2, 1, 0, 0, 1, 0]
    assert text.test.tolist() == [3, 3, 3, 3, 2]
    assert text.counts.tolist() == [3, 2, 1, 0]
    assert text.num_classes == 4


def test_a_text_that_is_not_there_is_named_and_one_that_is_is_read_once(text8, tmp_path, monkeypatch) -> None:
    datasets = importlib.import_module("benchmarks.datasets")
    monkeypatch.setattr(text8, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(text8, "TRAIN_WORDS", 3)
    with pytest.raises(datasets.MissingDataError, match=r"text8\.xz: no such file"):
        text8.load_text8(tmp_path)
    source = tmp_path / "text8" / "text8.xz"
    source.parent.mkdir()
    source.write_bytes(lzma.compress(b"b b a a a"))
    text = text8.load_text8(tmp_path)
    source.unlink()
    for found in (text, text8.load_text8(tmp_path)):
        assert (found.train.tolist(), found.test.tolist()) == ([0, 0, 1], [1, 1])


def test_a_window_is_the_words_before_its_place(text8) -> None:
    words = np.arange(100, 120, dtype=np.int32)
    context_NW, target_N = text8.windows(words, np.array([3, 19]), 3)
    assert context_NW.tolist() == [[100, 101, 102], [116, 117, 118]]
    assert target_N.tolist() == [103, 119]
    draws = [
        text8.random_windows(words, 500, 3, seed=seed, step=step) for seed, step in ((0, 1), (0, 2), (1, 1))
    ]
    assert all((context[:, -1] + 1 == target).all() for context, target in draws)
    assert set(draws[0][1].tolist()) == set(range(103, 120))
    assert not any(torch.equal(draws[0][1], other[1]) for other in draws[1:])
    assert torch.equal(draws[0][1], text8.random_windows(words, 500, 3, seed=0, step=1)[1])


LINES = ("simhash", "random by frequency", "torch dense", "torch adaptive")


@pytest.mark.parametrize("name", LINES)
def test_perplexity_is_that_of_the_words_probabilities(language_model, small_text, monkeypatch, name) -> None:
    monkeypatch.setattr(language_model, "ADAPTIVE_CUTOFFS", (5, 20))
    heads = importlib.import_module("benchmarks.language_heads")
    start = heads.first_layer(np.r_[np.full(WORDS // 2, 3), np.full(WORDS // 2, 1)])
    model = language_model.make_model(name, start, small_text.counts)
    sample = language_model.random_windows(small_text.test, 64, heads.CONTEXT, seed=1, step=0)
    hidden_ND = model.encoder(sample[0])
    if name == "torch adaptive":
        log_share_NC = model.head.log_prob(hidden_ND)
    else:
        assert float(start.bias.detach().exp().sum()) == pytest.approx(1)
        log_share_NC = start(hidden_ND).log_softmax(1)
        with torch.no_grad():
            model.head.weight.zero_()
            if name == "torch dense":
                model.head.updated()
        half = torch.tensor([0, 0, 39, 39])
        known = language_model.perplexity(model, sample[0][:4], half)
        assert known == pytest.approx(math.sqrt(80 / 3 * 80), rel=1e-5)
        model.head.weight.data.copy_(start.weight)
    expected = float((-log_share_NC[torch.arange(64), sample[1]]).mean().exp().detach())
    assert language_model.perplexity(model, *sample) == pytest.approx(expected, rel=1e-5)


def test_the_dense_head_of_a_model_learns_as_the_exact_loss_module(language_model, small_text) -> None:
    heads = importlib.import_module("benchmarks.language_heads")
    start = heads.first_layer(small_text.counts)
    dense = heads.DenseModel(start, language_model.BATCH, "float32", 1e-2, 1e-3)
    exact = heads.SampledModel(
        start,
        language_model.SamplingOptions(
            mode="exact", optimizer="adam", learning_rate=1e-2, precision="float32"
        ),
        1e-3,
    )
    for step in range(3):
        batch = language_model.random_windows(
            small_text.train, language_model.BATCH, heads.CONTEXT, seed=0, step=step
        )
        assert dense.step(*batch) == pytest.approx(exact.step(*batch), rel=1e-4)
    for ours, theirs in zip(exact.encoder.parameters(), dense.encoder.parameters(), strict=True):
        # Adam's first steps are the gradient's sign, also where that is a rounding error.
        assert torch.isclose(ours, theirs, rtol=0, atol=1e-4).float().mean() > 0.99


def test_a_race_gives_all_the_same_time_and_measures_them_after_the_same_steps(
    language_model, small_text, monkeypatch
) -> None:
    monkeypatch.setattr(language_model, "ADAPTIVE_CUTOFFS", (5, 20))
    monkeypatch.setattr(language_model, "BATCH", 32)
    for settings in language_model.SAMPLED.values():
        monkeypatch.setitem(settings, "pool_size", 10)
    ticks, dense_step = itertools.count(), language_model.DenseModel.step

    def slow_step(model, *batch) -> float:
        """Takes three ticks where the others, with the reading of the clock, take one."""
        next(ticks), next(ticks)
        return dense_step(model, *batch)

    monkeypatch.setattr(language_model.DenseModel, "step", slow_step)
    race = language_model.Race(
        laps=2, measure_every=1, dense_steps=8, test_rows=100, lines=LINES[:2] + LINES[3:]
    )
    told = []
    runs = language_model.run_race(small_text, race, told.append, lambda: float(next(ticks)))
    assert list(runs) == [language_model.DENSE, *race.lines]
    assert len(told) == 2 * len(runs)
    for name, run in runs.items():
        dense = name == language_model.DENSE
        assert run.seconds == 48
        assert run.laps == [3000.0, 3000.0] if dense else [1000.0, 1000.0]
        assert [point.step for point in run.curve] == ([0, 8, 16] if dense else [0, 16, 24, 48])
        assert [point.seconds for point in run.curve] == ([0, 24, 48] if dense else [0, 16, 24, 48])
        assert run.curve[-1].perplexity < run.curve[0].perplexity
        assert language_model.after_steps(run.curve, 16) < run.curve[0].perplexity
    found = language_model.table_lines(small_text, runs)
    assert [line.unit for line in found] == ["ms", "s", ""] * 2
    assert [line.facts()["ratio"] for line in found[::3]] == [3, 3]
    assert all(len(line.cells()) == 9 for line in found)
    assert found[2].ours == [runs["simhash"].curve[-1].perplexity]
    assert found[2].theirs == [runs[language_model.DENSE].curve[-1].perplexity]


def test_losses_that_are_compared_are_of_the_same_rows_and_weights(
    language_model, small_text, monkeypatch
) -> None:
    heads = importlib.import_module("benchmarks.language_heads")
    monkeypatch.setattr(language_model, "BATCH", 32)
    for settings in language_model.SAMPLED.values():
        monkeypatch.setitem(settings, "pool_size", WORDS)  # at random_share 1 all words: the loss is exact
        monkeypatch.setitem(settings, "random_share", 1.0)
    start = heads.first_layer(small_text.counts)
    model = language_model.make_model("random", start, small_text.counts)
    before = model.head.weight.detach().clone()
    lines = language_model.estimates(model, small_text, batches=3)
    assert [line["correction"] for line in lines] == ["none", "stratified", "logq"] * len(
        language_model.SAMPLED
    )
    assert torch.equal(model.head.weight, before)
    for line in lines:
        assert line["sampled loss"] == pytest.approx(line["exact loss"] + line["difference"])
        if "frequency" not in line["line"]:
            assert abs(line["difference"]) < 1e-4
            assert line["standard error"] < 1e-4


def test_seconds_to_a_perplexity_are_read_off_the_curve(language_model) -> None:
    curve = [language_model.Point(i, 10.0 * i, p) for i, p in enumerate([100.0, 80.0, 90.0, 40.0])]
    assert language_model.seconds_to(curve, 100.0) == 0
    assert language_model.seconds_to(curve, 85.0) == pytest.approx(7.5)
    assert language_model.seconds_to(curve, 65.0) == pytest.approx(25)
    assert language_model.seconds_to(curve, 39.0) == math.inf
    assert language_model.after_steps(curve, 2) == 90
    assert math.isnan(language_model.after_steps(curve, 5))


def test_a_run_stops_after_steps_or_seconds_whichever_comes_first(language_model, small_text) -> None:
    class Counting:
        steps = 0

        def step(self, *_batch: torch.Tensor) -> float:
            self.steps += 1
            return 0.0

    ticks = iter(range(1000))
    run = language_model.Run(Counting(), small_text.train, clock=lambda: float(next(ticks)))
    run.train(steps=3)
    assert (run.step, run.seconds) == (3, 3)
    run.train(steps=10, seconds=4)
    assert (run.step, run.seconds) == (7, 7)
    run.train(seconds=0)
    assert run.step == run.model.steps == 7


def test_make_bench_skips_what_has_no_data_and_says_so(monkeypatch, tmp_path) -> None:
    command = importlib.import_module("benchmarks.__main__")
    datasets = importlib.import_module("benchmarks.datasets")
    report = importlib.import_module("benchmarks.report")
    kind, values, *_ = datasets.MissingDataError("text8.xz: no such file").__reduce__()
    error = kind(*values)  # as it comes out of a child process
    line = report.Comparison("work", "rival", "ms", [1.0], [2.0])
    written = []

    def run(function, *_arguments):
        if function is importlib.import_module("benchmarks.language_model").compare:
            raise error
        return [line]

    monkeypatch.setattr(command, "in_child", run)
    monkeypatch.setattr(command, "set_threads", lambda _threads: None)
    monkeypatch.setattr(command, "write_results", lambda *arguments: written.append(arguments))
    arguments = ["--only", "language", "--only", "kernels", "--data", str(tmp_path)]
    result = CliRunner().invoke(command.main, arguments)
    assert result.exit_code == 0, result.output
    assert "\nskipped, part language: text8.xz: no such file\n" in result.stdout
    assert [name for name, *_ in written] == ["bench-language-kernels"]
    assert written[0][2] == [line.facts()]
    assert "language" in command.PARTS
    assert "language" not in command.QUICK_PARTS
