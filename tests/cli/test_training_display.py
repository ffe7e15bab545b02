"""What is said while kernels compile: once, and only then."""

from __future__ import annotations

from slidex.cli.training_display import COMPILING, TrainingDisplay

CONFIG = {"mode": "exact", "batch_size": 4, "precision": "float32", "device": "cpu"}
START = {"step": 0, "total_steps": 3, "config": CONFIG}


def shown(capsys, *events):
    with TrainingDisplay() as display:
        for event, facts in events:
            display(event, facts)
    return capsys.readouterr().err.splitlines()


def test_a_run_that_loads_its_kernels_says_nothing_of_compiling(capsys):
    lines = shown(capsys, ("start", START), ("step", {"step": 1}))
    assert len(lines) == 1
    assert not any("compil" in line for line in lines)


def test_a_run_on_a_gpu_says_so(capsys):
    (line,) = shown(capsys, ("start", START | {"config": CONFIG | {"device": "cuda:1"}}))
    assert line == "mode exact, 3 steps of 4 rows, precision float32, index none, on cuda:1"
    assert "on c" not in shown(capsys, ("start", START))[0]


def test_a_run_that_compiles_says_so_once_and_its_bar_names_the_kernels(capsys, monkeypatch):
    compiling = [("compiling", {"kernel": name}) for name in ("one", "two")]
    assert shown(capsys, *compiling, ("start", START), *compiling).count(COMPILING) == 1

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    text = "\n".join(shown(capsys, ("start", START), *compiling, ("step", {"step": 1})))
    assert text.count(COMPILING) == 1
    assert text.index("compiling one") < text.index("compiling two")
    assert "compiling two" not in text[text.rindex("1/3") :]
