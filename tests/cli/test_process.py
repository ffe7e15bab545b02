"""What only a process of its own shows: signals, exit codes, pipes, and progress bars on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import time

import pytest

from slidex.train.checkpoint import list_checkpoints
from slidex.train.run import Run

SMALL = (
    *("--mode", "exact", "--hidden-width", "8", "--threads", "1"),
    *("--valid-every", "100000", "--checkpoint-every", "100000"),
)
LONG = (*SMALL, "--epochs", "1000000", "--report-every", "5")
PATIENCE = 60.0
"""Seconds until something that must happen counts as never happening."""

STALLED = """
import sys, time
import {module} as module
def stall(*_, **__):
    print("stalled", file=sys.stderr, flush=True)
    for _ in range(6000):
        time.sleep(0.1)  # one long sleep would miss a signal that comes just before it
module.{name} = stall
from slidex.cli import main
main(prog_name="slidex")
"""
"""A slidex that stands still, asleep, where it would call a function."""


def wait_for(text, stream):
    lines = []
    for line in stream:
        lines.append(line)
        if text in line:
            return
    pytest.fail(f"{text!r} never came: {''.join(lines)}")


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_resume_goes_on_to_the_end(start, invoke, easy_data, tmp_path, number):
    process = start("train", easy_data.path, "--out", tmp_path / "run", *LONG)
    wait_for("step 5 |", process.stderr)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 75, stderr
    assert f"stopped by {number.name} after step" in stderr
    assert "Traceback" not in stderr
    assert stdout == ""
    stopped = list_checkpoints(tmp_path / "run" / "checkpoints")[-1].step
    invoke("train", easy_data.path, "--out", tmp_path / "run", "--resume", "--max-steps", stopped + 7)
    run = Run.open(tmp_path / "run")
    assert run.checkpoint().step == stopped + 7
    assert listing(tmp_path / "run" / "checkpoints")[-1] == f"step_{stopped + 7:08d}"


def test_a_second_ctrl_c_stops_at_once(start, easy_data, tmp_path):
    script = STALLED.format(module="slidex.train.loop", name="save_checkpoint")
    process = start("train", easy_data.path, "--out", tmp_path / "run", *LONG, script=script)
    wait_for("step 5 |", process.stderr)
    process.send_signal(signal.SIGINT)
    wait_for("stalled", process.stderr)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert stderr == "Interrupted.\n"
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_during_prepare_leaves_nothing(start, files, number, code):
    before = listing(files)
    script = STALLED.format(module="slidex.data.svmlight", name="write_names")
    process = start("prepare", "xmc", "train.txt", "--out", "data", script=script)
    wait_for("stalled", process.stderr)
    assert any(name.startswith(".data.tmp-") for name in listing(files))
    process.send_signal(number)
    _, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == code
    assert stderr.endswith({143: "Terminated.\n", 130: "Interrupted.\n"}[code])
    assert listing(files) == before


def test_lines_are_answered_as_they_come_and_sigterm_leaves_no_file(start, text_run, tmp_path):
    process = start("predict", text_run, "-", "--k", "1", stdin=subprocess.PIPE)
    for word in ("apple", "zinc"):
        process.stdin.write(word + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["classes"][0]["name"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143

    process = start("predict", text_run, "-", "--output", tmp_path / "found.jsonl", stdin=subprocess.PIPE)
    deadline = time.monotonic() + PATIENCE
    while not listing(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert listing(tmp_path)[0].startswith(".found.jsonl.tmp-")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 143
    assert listing(tmp_path) == []


def test_a_reader_that_goes_away_is_no_traceback(start, text_run):
    process = start("predict", text_run, "-", "--k", "1", stdin=subprocess.PIPE)
    process.stdin.write("apple\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith('{"row": 0')
    process.stdout.close()
    process.stdin.write("zinc\n")
    process.stdin.close()
    assert process.stderr.read() == ""
    assert process.wait(PATIENCE) == 1


def test_exit_codes_and_streams_of_a_process(start, trained, easy_data, tmp_path):
    process = start("eval", trained, easy_data.path, "--json", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert (process.returncode, stderr) == (0, "")
    assert json.loads(stdout)["rows"] == 200
    process = start("inspect", tmp_path)
    stdout, stderr = process.communicate(timeout=PATIENCE)
    assert (process.returncode, stdout) == (3, "")
    assert stderr.startswith("Error: ")
    assert stderr.count("\n") == 1


def on_a_terminal(*words):
    """What a slidex process with its standard error on a terminal of 140 columns writes there."""
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 140))
    process = subprocess.Popen(
        [sys.executable, "-m", "slidex", *map(str, words)], stderr=terminal, stdout=subprocess.PIPE, text=True
    )
    os.close(terminal)
    seen = b""
    try:
        while piece := os.read(screen, 4096):
            seen += piece
    except OSError:  # how Linux says that the other end is closed
        pass
    finally:
        os.close(screen)
    stdout, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, seen.decode()
    return seen.decode(), stdout


def test_training_on_a_terminal_shows_one_bar_with_reports_above_it(easy_data, tmp_path):
    words = ("--epochs", 20, "--report-every", 50)
    seen, stdout = on_a_terminal("train", easy_data.path, "--out", tmp_path / "run", *SMALL, *words)
    assert stdout == ""
    assert re.search(r"train: +\d+%\|.*\| \d+/100 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(step/s|s/step)\]", seen)
    assert "100/100 [" in seen
    left = [line.rsplit("\r", 1)[-1] for line in seen.replace("\r\n", "\n").split("\n")]
    order = ["step 50 |", "step 100 |", "train: 100%", "trained: "]
    shown = [line for line in left[1:-1] if not line.startswith("compiling kernels")]  # where nobody had yet
    assert [next(o for o in order if line.startswith(o)) for line in shown] == order


def test_prepare_on_a_terminal_shows_rows_per_second_and_the_time_left(files):
    seen, _ = on_a_terminal("prepare", "xmc", files / "train.txt", "--out", files / "data")
    assert re.search(r"prepare: +100%\|.*\[\d\d:\d\d<\d\d:\d\d,.*300 rows, [\d,]+ rows/s\]", seen)


def test_eval_and_predict_on_a_terminal_count_rows(easy_data, trained, tmp_path):
    seen, stdout = on_a_terminal("eval", trained, easy_data.path, "--json")
    assert json.loads(stdout)["rows"] == 200
    assert re.search(r"eval: +100%\|.*\| 200/200 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+row/s\]", seen)
    seen, stdout = on_a_terminal("predict", trained, easy_data.path, "--output", tmp_path / "found")
    assert stdout == ""
    assert re.search(r"predict: +100%\|.*\| 200/200 \[", seen)
