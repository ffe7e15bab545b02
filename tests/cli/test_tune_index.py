"""`slidex tune-index`, and `eval` and `predict` with what it chose, by frequency, with mistakes and probabilities."""

from __future__ import annotations

import json
import shutil

import pytest

FAST = ("--indexes", "simhash", "--rows", 80, "--partition-classes", 50)


@pytest.fixture(scope="module")
def tuned(invoke, easy_data, trained, tmp_path_factory):
    """A copy of `trained` with a tuned index, and what the command printed."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(trained, run)
    return run, invoke("tune-index", run, easy_data.path, *FAST)


def records(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_tune_index_says_what_it_chose_and_what_that_keeps(tuned):
    run, result = tuned
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{run}: simhash (bits ")
    assert lines[1] == "on 40 other rows of the valid split:"
    for start in ("of exact scoring's hits at 1", "P@1", "of its best 5", "a row, in batches", "a row alone"):
        assert any(line.strip().startswith(start) for line in lines), start
    assert "partition function" in lines[-1]
    assert "50 random classes" in lines[-1] or "random classes" in lines[-1]
    tried = result.stderr.splitlines()
    assert all(line.startswith(("+ simhash", "- simhash")) for line in tried)
    assert any(line.startswith("+") for line in tried)


def test_eval_says_which_index_it_uses(invoke, easy_data, trained, tuned):
    run, _ = tuned
    text = invoke("eval", run, easy_data.path, "--index").stdout
    assert "tuned index: simhash (bits " in text
    assert "tuned on 40 rows of the valid split; on 40 others it kept" in text
    assert "partition function             off by" in text
    assert "among those" not in text
    assert (
        "among those of the valid split"
        in invoke("eval", run, easy_data.path, "--index", "--split", "valid").stdout
    )
    assert "tuned index" not in invoke("eval", run, easy_data.path).stdout
    assert "index: that of training" in invoke("eval", trained, easy_data.path, "--index").stdout
    facts = json.loads(invoke("eval", run, easy_data.path, "--index", "--json").stdout)
    assert facts["tuned_index"]["chosen_on"] == 40


def test_predict_says_which_index_it_uses(invoke, easy_data, trained, tuned):
    run, _ = tuned
    result = invoke("predict", run, easy_data.path, "--index", "--probabilities", "--k", 2)
    assert result.stderr.startswith("tuned index: simhash (bits ")
    assert "partition function             off by" in result.stderr
    assert all(
        0 < item["probability"] <= 1 for record in records(result.stdout) for item in record["classes"]
    )
    assert "partition" not in invoke("predict", run, easy_data.path, "--index").stderr
    result = invoke("predict", trained, easy_data.path, "--index", "--probabilities")
    assert "index: that of training" in result.stderr
    assert "of unknown error: slidex tune-index measures it" in result.stderr
    assert invoke("predict", run, easy_data.path).stderr == ""


def test_inspect_names_it(invoke, trained, tuned):
    assert "simhash (bits " in invoke("inspect", tuned[0]).stdout
    assert json.loads(invoke("inspect", trained, "--json").stdout)["index of prediction"] is None


def test_exact_probabilities_add_up(invoke, easy_data, trained):
    result = invoke("predict", trained, easy_data.path, "--probabilities", "--k", 300)
    for record in records(result.stdout):
        assert sum(item["probability"] for item in record["classes"]) == pytest.approx(1.0, abs=1e-4)


def test_json(invoke, easy_data, trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    words = (
        "--recall",
        0.5,
        "--measure",
        "top-k",
        "--k",
        3,
        "--split",
        "test",
        "--train-rows",
        50,
        "--threads",
        1,
    )
    facts = json.loads(invoke("tune-index", run, easy_data.path, *FAST, *words, "--json").stdout)
    assert facts["rows"]["goal"] == 0.5
    assert facts["rows"]["measure"] == "top-k"
    assert facts["rows"]["source"] == "the test split"
    assert facts["rows"]["learned_from"] == 50
    assert facts["report"]["k"] == 3
    assert facts["report"]["threads"] == 1
    assert facts["report"]["partition"]["classes"] >= 50
    assert len(facts["trials"]) > 3


def test_wrong_use(invoke, easy_data, trained, text_run):
    result = invoke("tune-index", trained, easy_data.path, "--recall", 2, code=2)
    assert (
        "The 'recall' parameter of tune-index must be above 0 and at most 1. Got 2.0 instead."
        in result.stderr
    )
    result = invoke("tune-index", trained, easy_data.path, "--indexes", "simhsh", code=2)
    assert "The 'indexes' parameter of tune-index must be" in result.stderr
    result = invoke("tune-index", text_run, easy_data.path, code=3)
    assert "has 300 classes" in result.stderr


def test_a_run_trained_without_an_index_can_be_tuned(invoke, text_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(text_run, run)
    invoke("tune-index", run, text_run.parent / "data", "--indexes", "simhash", "--rows", 40)
    assert "tuned index" in invoke("predict", run, "-", "--index", input="apple pear").stderr


def test_a_resumed_run_wants_to_be_tuned_again(invoke, easy_data, tuned, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tuned[0], run)
    invoke("train", easy_data.path, "--out", run, "--resume", "--epochs", 31)
    (run / "best.json").unlink()  # so that the last checkpoint is used
    last = max((run / "checkpoints").glob("step_*"))
    result = invoke("predict", run, easy_data.path, "--index", code=1)
    assert (
        f"the run now uses step {int(last.name[5:])}. Run slidex tune-index again, or remove the file."
        in result.stderr
    )


def test_eval_by_frequency_and_errors(invoke, easy_data, trained, text_run):
    facts = json.loads(
        invoke(
            "eval",
            text_run,
            text_run.parent / "data",
            "--split",
            "train",
            "--by-frequency",
            "--errors",
            4,
            "--json",
        ).stdout
    )
    assert [line["decile"] for line in facts["by_frequency"]] == [*map(str, range(1, 11)), "unseen"]
    added = sum(line["share of P@3"] for line in facts["by_frequency"])
    assert added == pytest.approx(facts["P@3"])
    facts = json.loads(invoke("eval", trained, easy_data.path, "--errors", 2, "--index", "--json").stdout)
    assert "by_frequency" not in facts
    assert len(facts["errors"]) <= 2
    text = invoke("eval", trained, easy_data.path, "--by-frequency", "--errors", 2).stdout
    assert "decile" in text
    assert "worst " in text
    assert "decile" not in invoke("eval", trained, easy_data.path).stdout
