"""benchmarks/accuracy.py and peers.py without their long runs: the book of lines, its tables, and peers that fail."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import slidex
from slidex.data import prepare_xmc

ROOT = Path(__file__).resolve().parents[1]
FACTS = {"processor": "Abacus", "vector instructions": "beads", "commit": "abc1234", "threads": 1}


@pytest.fixture(autouse=True)
def _importable(monkeypatch) -> None:
    monkeypatch.syspath_prepend(ROOT)


@pytest.fixture
def accuracy(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.import_module("benchmarks.report"), "RESULTS", tmp_path)
    module = importlib.import_module("benchmarks.accuracy")
    document = tmp_path / "accuracy.md"
    document.write_text(f"# Head\n\n{module.MARKS[0]}\nold\n\n{module.MARKS[1]}\nFoot\n")
    monkeypatch.setattr(module, "DOCUMENT", document)
    return module


@pytest.fixture
def peers():
    return importlib.import_module("benchmarks.peers")


def measured(accuracy, p1: float = 50.0) -> dict[str, float]:
    """A line's figures, all different."""
    names = [*accuracy.METRICS, *accuracy.MEASURES]
    return {name: p1 + place for place, name in enumerate(names)}


def book(accuracy, tmp_path, **options):
    facts = {**FACTS, **options.pop("facts", {})}
    return accuracy.Book(tmp_path / "accuracy.json", facts, **options)


IDENTITY = {"set": "eurlex-4k", "method": "napkinXC PLT", "seed": 0}


def test_a_line_is_measured_once_and_again_when_what_it_depends_on_changes(accuracy, tmp_path) -> None:
    calls = []

    def measure(p1: float = 50.0):
        calls.append(p1)
        return measured(accuracy, p1)

    first = book(accuracy, tmp_path).line(IDENTITY, "k", measure)
    other = book(accuracy, tmp_path).line({**IDENTITY, "set": "stdlib"}, "k", measure)
    assert len(calls) == 2
    again = book(accuracy, tmp_path)  # as a later run reads the file
    assert again.line(IDENTITY, "k", measure) == first
    assert len(calls) == 2
    assert (first["commit"], first["processor"], first["P@1"]) == ("abc1234", "Abacus, beads", 50.0)
    changed = again.line(IDENTITY, "another", lambda: measure(60.0))
    assert changed["P@1"] == 60.0
    stored = json.loads((tmp_path / "accuracy.json").read_text())
    assert stored["results"] == [other, changed]
    assert stored["machine"] == FACTS
    elsewhere = book(accuracy, tmp_path, facts={"vector instructions": "rods"})
    assert elsewhere.line(IDENTITY, "another", lambda: measure(70.0))["P@1"] == 70.0
    anew = book(accuracy, tmp_path, facts={"processor": "Slide rule"}, again=True)
    assert anew.line(IDENTITY, "another", lambda: measure(80.0))["P@1"] == 80.0


def test_what_failed_is_kept_and_run_again_if_asked(accuracy, tmp_path) -> None:
    lost = book(accuracy, tmp_path).line(IDENTITY, "k", lambda: {"failed": "stopped after 25 minutes"})
    assert book(accuracy, tmp_path).line(IDENTITY, "k", lambda: measured(accuracy)) == lost
    retried = book(accuracy, tmp_path, retry=True)
    assert "failed" not in retried.line(IDENTITY, "k", lambda: measured(accuracy))
    kept = book(accuracy, tmp_path, retry=True).line(IDENTITY, "k", lambda: pytest.fail("it had not failed"))
    assert kept["P@1"] == 50.0


def test_tables_have_a_line_for_each_method_with_means_over_seeds(accuracy) -> None:
    day = {"day": "2026-11-25"}
    lines = [
        {"set": "eurlex-4k", "method": "slidex fast", "seed": 0, **day, **measured(accuracy, 70.0)},
        {
            "set": "eurlex-4k",
            "method": "slidex fast",
            "seed": 1,
            "day": "2026-11-26",
            **measured(accuracy, 72.0),
        },
        {"set": "eurlex-4k", "method": "omikuji, 1 tree", "seed": 0, **day, **measured(accuracy, 1234.5678)},
        {"set": "eurlex-4k", "method": "napkinXC PLT", "seed": 0, **day, "failed": "does not install: no"},
        {"set": "a-set-of-ours", "method": "slidex fast", "seed": 0, **day, **measured(accuracy)},
    ]
    text = accuracy.tables(lines)
    first, second = text.split("\n\n### ")
    assert first.startswith("### eurlex-4k\n\n")
    assert second.startswith("a-set-of-ours\n\n")
    head, rule, *rows = first.splitlines()[2:]
    widths = {line.count("|") for line in (head, rule, *rows)}
    assert widths == {len(accuracy.HEADINGS) + 1}
    assert head.startswith("|  | P@1 | P@3 | P@5 | nDCG@5 | PSP@1 | PSP@3 | PSP@5 | R@10 | train CPU s |")
    assert rows[0].startswith("| omikuji, 1 tree | 1234.57 | 1235.57 | ")
    assert rows[0].endswith("| 1,243 | 1,244 | 1,245 | 1,246 | 2026-11-25 |")
    assert rows[1] == "| napkinXC PLT | does not install: no |" + "  |" * 11 + " 2026-11-25 |"
    assert rows[2].startswith("| slidex fast, 2 seeds | 71.00 ± 1.41 | 72.00 ± 1.41 | ")
    assert rows[2].endswith("| 79 | 80 | 81 | 82 | 2026-11-25 to 2026-11-26 |")
    lost = [lines[0], {**lines[1], "failed": "diverged"}]
    assert "| slidex fast, 1 failed: diverged | 70.00 |" in accuracy.tables(lost)


def test_predictions_are_judged_with_the_propensities_of_the_training_rows(accuracy, easy_data) -> None:
    y = easy_data.split("test").y
    best = np.full((y.num_rows, accuracy.K), -1, dtype=np.int32)
    best[:, :2] = np.asarray(y.indices).reshape(-1, 2)
    found = accuracy.judged(easy_data, best)
    assert found["P@1"] == found["nDCG@5"] == found["recall@10"] == 100
    assert found["P@5"] == pytest.approx(40)
    counts = easy_data.class_counts()
    q = 1 / slidex.metrics.propensities(counts, easy_data.split("train").num_rows)[best[:, :2]]
    assert found["PSP@1"] == pytest.approx(100 * q[:, 0].sum() / q.max(1).sum())


def test_slidex_is_measured_as_its_own_commands_would(accuracy, easy_data, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(accuracy, "load", lambda *_: easy_data)
    settings = slidex.TrainConfig(hidden_width=16, batch_size=64, epochs=6, mode="exact", threads=1)
    line = accuracy.train_slidex("easy", tmp_path, settings.to_mapping())
    run = slidex.fit(easy_data, tmp_path / "run", settings)
    assert line["P@1"] == pytest.approx(100 * slidex.evaluate(run, easy_data)["P@1"])
    weights = 4 * (320 * 16 + 16 + 300 * 16 + 300)
    assert weights < 1e6 * line["model_mb"] < weights + 40_000  # and names, settings, class counts
    assert all(line[name] > 0 for name in ("train_cpu_s", "predict_cpu_us", "peak_mb"))


def test_a_training_that_diverges_or_is_killed_is_a_line_of_the_table(
    accuracy, easy_data, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(accuracy, "load", lambda *_: easy_data)
    lines = book(accuracy, tmp_path)
    for seed, error in enumerate(
        (slidex.errors.DivergedError("the loss is nan"), BrokenProcessPool("killed"))
    ):

        def fail(*_arguments, error=error):
            raise error

        monkeypatch.setattr(accuracy, "in_child", fail)
        line = accuracy.slidex_line(lines, "easy", tmp_path, "fast", {}, seed, 1)
        assert line["failed"] == str(error)
    keys = {line["key"] for line in lines.lines}
    keys.add(accuracy.slidex_line(lines, "easy", tmp_path, "accurate", {}, 0, 1)["key"])
    monkeypatch.setattr(accuracy, "source_digest", lambda: "changed")
    keys.add(accuracy.slidex_line(lines, "easy", tmp_path, "fast", {}, 0, 1)["key"])
    exact = accuracy.slidex_line(lines, "easy", tmp_path, "fast", {"mode": "exact", "epochs": 1}, 0, 1)
    assert exact["method"] == "slidex fast, mode exact, epochs 1"
    assert accuracy.place(exact["method"]) == accuracy.place("slidex fast")
    assert exact["key"] not in keys
    assert len(keys) == 4  # seed, settings and code


def test_what_peers_are_handed_is_the_set_at_unit_norm(peers, easy_data, tmp_path) -> None:
    job = peers.hand_over(easy_data, tmp_path / "out")
    folder = Path(job["data"]) / "train"
    split = easy_data.split("train")
    values = np.load(folder / "x_values.npy")
    assert values == pytest.approx(np.full(split.x.nnz, 0.5))  # four features a row
    assert np.load(folder / "y_indices.npy").tolist() == split.y.indices.tolist()
    read = prepare_xmc(Path(job["text"]), tmp_path / "read").split("train")
    assert read.x.indices.tolist() == split.x.indices.tolist()
    assert read.x.values == pytest.approx(values)
    assert read.y.indptr.tolist() == split.y.indptr.tolist()
    assert read.y.indices.tolist() == split.y.indices.tolist()


@pytest.fixture
def here(peers, monkeypatch) -> None:
    """napkinXC, which the tests have, as if it were in an environment of its own."""
    pytest.importorskip("napkinxc")
    monkeypatch.setattr(peers, "environment", lambda *_: Path(sys.executable))


@pytest.mark.usefixtures("here")
def test_a_peer_trains_predicts_and_is_kept(peers, accuracy, easy_data, monkeypatch, tmp_path) -> None:
    plt = peers.BY_NAME["napkinxc-plt"]
    measures, ids_NK = peers.run_peer(plt, "easy", easy_data, threads=1, folder=tmp_path)
    assert ids_NK.shape == (200, peers.K)
    assert accuracy.judged(easy_data, ids_NK)["P@1"] > 95
    assert all(measures[name] > 0 for name in accuracy.MEASURES)
    assert not (tmp_path / "model").exists()
    monkeypatch.setattr(peers, "environment", lambda *_: pytest.fail("it is in the cache"))
    again, same_NK = peers.run_peer(plt, "easy", easy_data, threads=1, folder=tmp_path)
    assert again == measures
    assert (same_NK == ids_NK).all()
    keys = {
        peers.peer_key(plt, easy_data, 1),
        peers.peer_key(plt, easy_data, 2),
        peers.peer_key(replace(plt, settings={"arity": 4}), easy_data, 1),
    }
    assert len(keys) == 3
    with pytest.raises(pytest.fail.Exception, match="in the cache"):
        peers.run_peer(plt, "easy", easy_data, threads=1, folder=tmp_path, again=True)


@pytest.mark.usefixtures("here")
def test_a_peer_that_fails_or_takes_too_long_gives_the_reason(peers, easy_data, tmp_path) -> None:
    plt = peers.BY_NAME["napkinxc-plt"]
    wrong = replace(plt, settings={"arity": None, "tree_structure": 7})
    with pytest.raises(peers.PeerError, match=r"failed with exit status 1: TypeError: .*tree_structure"):
        peers.run_peer(wrong, "easy", easy_data, threads=1, folder=tmp_path)
    with pytest.raises(peers.PeerError, match=r"stopped after 0\.0001 minutes, training"):
        peers.run_peer(plt, "easy", easy_data, threads=1, minutes=1e-4, folder=tmp_path)


def test_a_peer_that_does_not_install_is_a_line_of_the_table(
    peers, accuracy, easy_data, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(peers, "FOLDER", tmp_path / "cache")
    monkeypatch.setitem(peers.REQUIREMENTS, "omikuji", (("--no-index", "omikuji-of-another-world"),))
    monkeypatch.setattr(accuracy, "load", lambda *_: easy_data)
    monkeypatch.setattr(
        accuracy, "run_peer", lambda *args, **kw: peers.run_peer(*args, folder=peers.FOLDER, **kw)
    )
    lines = book(accuracy, tmp_path)
    line = accuracy.peer_line(lines, "easy", tmp_path, peers.BY_NAME["omikuji-1"], 1, 1.0)
    assert line["failed"].startswith("does not install: ERROR: No matching distribution")
    assert f"| omikuji, 1 tree | {line['failed']} |" in accuracy.tables(lines.lines)


def test_the_command_names_what_it_does_not_know_and_prints_what_is_there(
    accuracy, monkeypatch, tmp_path
) -> None:
    monkeypatch.setattr(importlib.import_module("benchmarks.datasets"), "CACHE", tmp_path / "cache")
    runner = CliRunner()
    wrong = runner.invoke(accuracy.main, ["--peers", "omikuji-1,parabel"])
    assert wrong.exit_code == 2
    assert "--peers: must be all, none or some of xr-linear," in wrong.output
    assert "Got 'parabel' instead" in wrong.output
    book(accuracy, tmp_path).line(IDENTITY, "k", lambda: measured(accuracy))
    printed = runner.invoke(accuracy.main, ["--print"])
    assert printed.exit_code == 0, printed.output
    assert "### eurlex-4k\n\n|  | P@1 |" in printed.stdout
    assert "| napkinXC PLT | 50.00 |" in printed.stdout
    document = accuracy.DOCUMENT.read_text()
    assert document.startswith(f"# Head\n\n{accuracy.MARKS[0]}\n### eurlex-4k\n")
    assert document.endswith(f" |\n\n{accuracy.MARKS[1]}\nFoot\n")
    skipped = runner.invoke(accuracy.main, ["--sets", "deb-deps-trixie", "--data", str(tmp_path)])
    assert skipped.exit_code == 0, skipped.output
    assert "\nskipped: " in skipped.stdout
    assert "deb-deps-trixie/train.jsonl.xz: no such file" in skipped.stdout


def test_the_command_trains_in_the_modes_and_epochs_it_is_asked_for(
    accuracy, easy_data, monkeypatch, tmp_path
) -> None:
    trained = []

    def in_child(function, _name, _data, settings):
        if function is accuracy.train_slidex:
            trained.append((settings["mode"], settings["epochs"], settings["seed"]))
        return measured(accuracy)

    monkeypatch.setattr(accuracy, "load", lambda *_: easy_data)
    monkeypatch.setattr(accuracy, "in_child", in_child)
    arguments = ["--sets", "easy", "--peers", "none", "--presets", "fast", "--modes", "preset,exact"]
    for more in (["--epochs", "7", "--seeds", "2"], ["--seeds", "1"]):
        done = CliRunner().invoke(accuracy.main, [*arguments, *more])
        assert done.exit_code == 0, done.output
    assert trained == [
        ("auto", 7, 0),
        ("auto", 7, 1),
        ("exact", 7, 0),
        ("exact", 7, 1),
        ("auto", 2, 0),
        ("exact", 2, 0),
    ]
    assert "| slidex fast, epochs 7, 2 seeds |" in done.stdout
    assert "| slidex fast, mode exact, epochs 7, 2 seeds |" in done.stdout
    assert "| slidex fast, mode exact | 50.00 |" in done.stdout


def test_what_benchmarks_write_does_not_make_a_commit_dirty(tmp_path) -> None:
    report = importlib.import_module("benchmarks.report")
    assert report.commit(tmp_path) == "unknown"

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True)

    results = tmp_path / "benchmarks" / "results" / "accuracy.json"
    results.parent.mkdir(parents=True)
    results.write_text("{}")
    (tmp_path / "code.py").write_text("1")
    git("init")
    git("add", ".")
    git("commit", "-m", "all")
    clean = report.commit(tmp_path)
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    results.write_text("[]")
    assert report.commit(tmp_path) == clean
    (tmp_path / "code.py").write_text("2")
    assert report.commit(tmp_path) == f"{clean}-dirty"


def test_the_document_shows_the_lines_of_the_results_file() -> None:
    accuracy = importlib.import_module("benchmarks.accuracy")
    lines = json.loads((ROOT / "benchmarks" / "results" / "accuracy.json").read_text())["results"]
    text = (ROOT / "docs" / "accuracy.md").read_text()
    assert text.partition(accuracy.MARKS[0])[2].partition(accuracy.MARKS[1])[0].strip() == accuracy.tables(
        lines
    )
