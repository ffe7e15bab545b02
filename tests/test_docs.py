"""What the documentation says is run: commands, Python, links, names of options and tests, tables of settings.

Every document is followed from top to bottom in an empty folder. A fenced block with ``file=NAME`` after its language
is written there; ``python`` blocks run in one namespace; lines of ``sh`` blocks and ``$`` lines of ``console`` blocks
run as commands, slidex within this process. A ``console`` block that shows an ``Error:`` line must fail with it.
Commands that ask for a FAISS index are left out where faiss is not installed.
Preparing the standard library reads 40 files and training takes 20 steps, so that all of it is quick.

``python tests/test_docs.py`` writes the current settings table into docs/training.md.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import types
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import click
import pytest
from click.testing import CliRunner

from slidex.cli import main
from slidex.lsh import index as registry
from slidex.lsh import index_names, index_settings
from slidex.train import loop
from slidex.train.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TABLE_MARKS = ("<!-- settings: written by python tests/test_docs.py -->\n", "<!-- end of settings -->\n")
SET_UP = {"pip", "python3", "python", ".venv/bin/pip", "git", "cd", "source", "."}
"""Commands of installation, which whoever runs this test has behind them."""
SMALL_SOURCES, FEW_STEPS = "40", 20
FAISS = importlib.util.find_spec("faiss") is not None
HASH_SETTINGS = "Hash indexes"
"""The section of docs/indexes.md with the settings that all hash indexes share."""

named = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


class Block(NamedTuple):
    language: str
    file: str | None
    text: str
    line: int


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a document; `line` is that of the opening fence."""
    found = []
    for match in re.finditer(r"^```(\w*)[^\S\n]*([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        file = re.search(r"file=(\S+)", match[2])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], file and file[1], match[3], line))
    return found


def prose(text: str) -> str:
    """The document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def commands(block: Block) -> list[tuple[str, list[str]]]:
    """The commands of a block, continued lines joined, each with the output shown below it."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.language == "sh":
        return [(line.strip(), []) for line in lines if line.strip() and not line.startswith("#")]
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith("$ "):
            found.append((line[2:], []))
        elif found:
            found[-1][1].append(line)
    return found


def run_line(line: str) -> tuple[int, str]:
    """Runs a command line of stages joined by ``&&`` and ``|``; the last exit code, and all that went to stderr."""
    lexer = shlex.shlex(line.partition(" #")[0], posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    piped, errors = "", ""
    for operator, group in groupby(lexer, key=lambda word: word if word in {"|", "&&"} else ""):
        if operator:
            piped = piped if operator == "|" else ""
            continue
        words = list(group)
        assert not {">", "<", ";", "&", "||"} & set(words), f"{line}: not understood by this test"
        if words[0] == "make":
            targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert {word for word in words[1:] if "=" not in word} <= set(targets), f"{line}: no such target"
        elif words[0] in {"slidex", ".venv/bin/slidex"}:
            done = CliRunner().invoke(main, words[1:], input=piped, prog_name="slidex")
            if done.exception and not isinstance(done.exception, SystemExit):
                raise done.exception
            piped, errors = done.stdout, errors + done.stderr
            if done.exit_code:
                return done.exit_code, errors
        elif words[0] not in SET_UP:
            assert words[0] in {"cat", "echo", "head", "ls", "printf", "tail"}, (
                f"{line}: not known to this test"
            )
            piped = subprocess.run(words, input=piped, text=True, check=True, stdout=subprocess.PIPE).stdout
    return 0, errors


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder, in which preparing and training are quick; indexes registered here are forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIDEX_PREPARE_PYTHON_SOURCE_MAX_FILES", SMALL_SOURCES)
    fit = loop.fit

    def fit_briefly(dataset: Any, out: Path, config: TrainConfig, **options: Any) -> Any:
        steps = min(config.max_steps or FEW_STEPS, FEW_STEPS)
        return fit(dataset, out, dataclasses.replace(config, max_steps=steps), **options)

    monkeypatch.setattr(loop, "fit", fit_briefly)
    for name in ("_FACTORIES", "_SETTINGS"):
        monkeypatch.setattr(registry, name, dict(getattr(registry, name)))
    return tmp_path


@named
def test_every_block_runs(document: Path, small: Path) -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(document.read_text()):
        place = f"{document.name}:{block.line}"
        if block.file:
            (small / block.file).write_text(block.text)
        elif block.language == "python":
            exec(compile("\n" * block.line + block.text, document, "exec"), namespace)  # noqa: S102
        elif block.language in {"sh", "console"}:
            for line, shown in commands(block):
                if "--index faiss" in line and not FAISS:
                    continue
                expected = [text for text in shown if text.startswith("Error: ")]
                code, errors = run_line(line)
                assert bool(code) == bool(expected), f"{place}: {line}\nexit code {code}\n{errors}"
                for text in expected:
                    assert text in errors.splitlines(), f"{place}: {line}\n{errors}"


@named
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document.read_text())):
        if re.match(r"https?://|mailto:", target):
            continue
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), f"{document.name}: {target}"
        assert not anchor or anchor in anchors(file.read_text()), f"{document.name}: {target}"


def anchors(text: str) -> set[str]:
    """GitHub's anchors of a document's headings."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@named
def test_options_tests_and_paths_named_in_the_text_exist(document: Path) -> None:
    for code in re.findall(r"`([^`\n]+)`", prose(document.read_text())):
        if re.fullmatch(r"--[a-z][a-z-]*", code):
            assert code in options(main), f"{document.name}: {code}"
        elif match := re.fullmatch(r"(tests/\S+\.py)::(\w+)", code):
            assert f"def {match[2]}(" in (ROOT / match[1]).read_text(), f"{document.name}: {code}"
        elif re.fullmatch(r"(slidex|tests|docs|benchmarks|examples)/[\w./]+", code):
            assert (ROOT / code).exists(), f"{document.name}: {code}"


def options(command: click.Command) -> set[str]:
    """The options of a command and of those below it."""
    found = {"--help"} | {name for item in command.params for name in (*item.opts, *item.secondary_opts)}
    below = command.commands.values() if isinstance(command, click.Group) else ()
    return found.union(*map(options, below))


def settings_table() -> str:
    """The fields of `TrainConfig` as a Markdown table."""
    hints = get_type_hints(TrainConfig)
    rows = ["| setting | default | allowed | meaning |", "| --- | --- | --- | --- |"]
    for item in dataclasses.fields(TrainConfig):
        default = "none" if item.default is dataclasses.MISSING else shown(item.default)
        help_text = item.metadata["help"].replace("|", "\\|")
        rows.append(
            f"| `{item.name}` | {default} | {allowed(hints[item.name], item.metadata)} | {help_text} |"
        )
    return "\n".join(rows) + "\n"


def shown(default: object) -> str:
    """A default as tables of settings show it."""
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, float):
        return f"{default:g}"
    return {None: "not set", (): "none"}.get(default, str(default))


def allowed(hint: Any, limits: Any) -> str:
    """The type and range of a setting, in words."""
    if "form" in limits:
        return limits["form"]
    if "choices" in limits:
        return ", ".join(f"`{choice}`" for choice in limits["choices"])
    if get_origin(hint) is dict:
        return "names and values"
    kinds = {kind for kind in (get_args(hint) or (hint,)) if kind not in (types.NoneType, ...)}
    words = {bool: "true or false", int: "whole number", float: "number", str: "text"}[kinds.pop()]
    low, high, below = (limits.get(name) for name in ("low", "high", "below"))
    if low is None:
        return words
    if high is not None:
        return f"{words}, {low} to {high}"
    return f"{words}, {low} or more" if below is None else f"{words}, from {low} to below {below}"


def test_the_settings_table_is_current() -> None:
    text = (ROOT / "docs" / "training.md").read_text()
    shown = text.split(TABLE_MARKS[0])[1].split(TABLE_MARKS[1])[0]
    assert shown == settings_table(), "run: python tests/test_docs.py"


def shown_defaults(text: str, section: str) -> dict[str, str]:
    """The settings in the tables of one section of a document, with their defaults."""
    body = re.search(
        rf"^#+ `?{re.escape(section)}`?\n(.*?)(?=^#+ |\Z)", prose(text), re.MULTILINE | re.DOTALL
    )
    assert body, f"no section {section}"
    return dict(re.findall(r"^\| `(\w+)` \| (.*?) \| [^|]+ \|$", body[1], re.MULTILINE))


@pytest.mark.parametrize("name", index_names())
def test_the_settings_of_an_index_are_current(name: str) -> None:
    text = (ROOT / "docs" / "indexes.md").read_text()
    settings = index_settings(name)
    told = shown_defaults(text, name)
    if "tables" in settings:
        told |= shown_defaults(text, HASH_SETTINGS)
    assert told == {setting: shown(default) for setting, default in settings.items()}


def test_defaults_are_shown_as_what_they_are() -> None:
    assert [shown(value) for value in (0, 1, 0.0, 1e-8, 1 / 3)] == ["0", "1", "0", "1e-08", "0.333333"]
    assert [shown(value) for value in (False, True, None, (), "auto")] == [
        "false",
        "true",
        "not set",
        "none",
        "auto",
    ]


def test_the_parts_of_a_document_are_told_apart() -> None:
    text = "# A b-c!\n```sh\n# no\nslidex a \\\n  b\n```\n```text file=x.txt\n1\n```\n```console\n$ a\nError: b\n```\n"
    sh, file, console = blocks(text)
    assert commands(sh) == [("slidex a    b", [])]
    assert (file.file, file.text, file.line) == ("x.txt", "1\n", 7)
    assert commands(console) == [("a", ["Error: b"])]
    assert anchors(text) == {"a-b-c"}


def test_a_wrong_command_is_noticed(small: Path) -> None:
    code, errors = run_line("slidex inspect nowhere")
    assert code == 3
    assert "nowhere" in errors
    with pytest.raises(AssertionError, match="no such target"):
        run_line("make coffee")
    with pytest.raises(AssertionError, match="not known"):
        run_line("brew coffee")
    assert run_line("echo a | cat && slidex --version") == (0, "")


if __name__ == "__main__":
    page = ROOT / "docs" / "training.md"
    before, rest = page.read_text().split(TABLE_MARKS[0])
    after = rest.split(TABLE_MARKS[1])[1]
    page.write_text(f"{before}{TABLE_MARKS[0]}{settings_table()}{TABLE_MARKS[1]}{after}")
