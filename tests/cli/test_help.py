"""Help answers quickly and its examples work; no option changes unnoticed.

``python tests/cli/test_help.py`` writes the present options into options.json, after a change that is meant.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
from click.testing import CliRunner

import slidex
from slidex.cli import main

if TYPE_CHECKING:
    from collections.abc import Iterator

OPTIONS = Path(__file__).with_name("options.json")
HELP_SECONDS = 0.3


def commands(command: click.Command = main, name: str = "slidex") -> Iterator[tuple[str, click.Command]]:
    """Every command with its full name, groups included."""
    yield name, command
    if isinstance(command, click.Group):
        for inner in command.commands.values():
            yield from commands(inner, f"{name} {inner.name}")


def options() -> dict[str, list[str]]:
    return {
        name: sorted(flag for p in command.params for flag in (*p.opts, *p.secondary_opts) if flag[0] == "-")
        for name, command in commands()
    }


NAMES = [name for name, _ in commands()]


def help_of(name: str) -> str:
    return (
        CliRunner().invoke(main, [*name.split()[1:], "--help"], prog_name="slidex", terminal_width=110).stdout
    )


def examples(name: str) -> list[str]:
    _, _, text = help_of(name).partition("\nExamples:\n")
    return [line.strip() for line in text.splitlines()]


def test_no_option_changed_unnoticed():
    assert options() == json.loads(OPTIONS.read_text())


@pytest.mark.parametrize("name", NAMES)
def test_help_answers_at_once(name):
    seconds = []
    for _ in range(3):
        with subprocess.Popen(
            [sys.executable, "-m", *name.split(), "--help"], stdout=subprocess.DEVNULL
        ) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(usage.ru_utime + usage.ru_stime)
    assert min(seconds) < HELP_SECONDS


def test_help_imports_nothing_heavy():
    script = f"""
import contextlib, io, sys
from slidex.cli import main
for name in {NAMES!r}:
    with contextlib.redirect_stdout(io.StringIO()):
        main([*name.split()[1:], "--help"], standalone_mode=False)
print(*sorted({{"torch", "numba", "numpy", "scipy", "sklearn", "tqdm"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_there_is(name):
    text = help_of(name)
    assert len(examples(name)) == 2
    assert all("slidex" in example for example in examples(name))
    assert "\\b" not in text
    for flag in options()[name]:
        assert flag in text


def test_defaults_are_shown():
    text = re.sub(r"\s+", " ", help_of("slidex train"))
    for flag, default in (
        ("--batch-size INTEGER", "256"),
        ("--normalize", "true"),
        ("--epsilon FLOAT", "1e-08"),
    ):
        assert re.search(rf"{flag} [^\[]*\[default: {default}", text), flag
    assert "[default: 1,3,5]" in help_of("slidex eval")


def run_line(line: str) -> None:
    """Runs a line of shell in this process: words, ``&&`` between commands, and ``echo ... |`` before one."""
    for command in line.split(" && "):
        said, _, piped = command.rpartition(" | ")
        words = shlex.split(piped)
        assert words[0] == "slidex", line
        stdin = " ".join(shlex.split(said)[1:]) + "\n" if said else None
        if "--out" in words:
            shutil.rmtree(words[words.index("--out") + 1], ignore_errors=True)
        result = CliRunner().invoke(main, words[1:], input=stdin, catch_exceptions=False, prog_name="slidex")
        assert result.exit_code == 0, f"{command}: {result.stderr}"
        assert result.stdout or result.stderr


def test_every_example_works(files, monkeypatch):
    monkeypatch.setattr("slidex.data.standard_library_directory", lambda: files / "src")
    monkeypatch.setenv("SLIDEX_TRAIN_HIDDEN_WIDTH", "8")  # small checkpoints
    monkeypatch.setenv("SLIDEX_TRAIN_THREADS", "1")
    order = [
        "prepare",
        "prepare python-source",
        "train",
        "tune-index",
        "eval",
        "predict",
        "inspect",
        "doctor",
        "",
    ]
    ranked = sorted(NAMES, key=lambda name: (order.index(name[7:]) if name[7:] in order else 0, name))
    lines = [line for name in ranked for line in examples(name)]
    assert len(lines) == 2 * len(NAMES)
    for line in dict.fromkeys(lines):
        run_line(line)
    assert len((files / "predictions.jsonl").read_text().splitlines()) > 0


def test_the_module_and_the_version():
    done = subprocess.run(
        [sys.executable, "-m", "slidex", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"slidex, version {slidex.__version__}\n"
    script = Path(sys.executable).with_name("slidex")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert slidex.__version__ in done.stdout


if __name__ == "__main__":
    OPTIONS.write_text(json.dumps(options(), indent=1) + "\n")
