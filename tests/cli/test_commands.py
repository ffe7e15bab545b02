"""`slidex train`, `eval` and `predict`: results, settings, and wrong use as one clear line."""

from __future__ import annotations

import json
import os

import pytest

from slidex.train.checkpoint import list_checkpoints
from slidex.train.config import TrainConfig
from slidex.train.coverage import CollapseWatch


def listing(folder):
    return sorted(path.name for path in folder.iterdir())


def settings_of(invoke, *words, **options):
    return json.loads(invoke("train", "data", "--out", "run", *words, "--print-config", **options).stdout)


def records(text):
    return [json.loads(line) for line in text.splitlines()]


# train


def test_settings_precedence(invoke, tmp_path):
    toml = tmp_path / "settings.toml"
    toml.write_text(
        'batch_size = 11\nepochs = 12\nlearning_rate = 0.5\nmode = "exact"\ndense_widths = [8, 4]\n'
    )
    env = {"SLIDEX_TRAIN_EPOCHS": "22", "SLIDEX_TRAIN_LEARNING_RATE": "0.25"}
    words = ("--preset", "slide", "--config", toml, "--learning-rate", "0.125", "--index-option", "tables=7")
    chosen = settings_of(invoke, *words, env=env)
    assert chosen["learning_rate"] == 0.125  # option
    assert chosen["epochs"] == 22  # environment
    assert chosen["batch_size"] == 11  # file
    assert chosen["mode"] == "exact"  # file over preset
    assert chosen["dense_widths"] == [8, 4]
    assert chosen["index_options"] == {"bits": 9, "tables": 7}  # preset, option
    assert chosen["hidden_width"] == 128  # default
    assert settings_of(invoke, env={"SLIDEX_TRAIN_CONFIG": str(toml)})["epochs"] == 12


def test_every_setting_is_an_option(invoke):
    changed = {
        "hidden_width": 7, "dense_widths": [6, 5], "input_dropout": 0.5, "normalize": False, "mode": "per_sample",
        "loss": "logistic", "index_options": {"bits": 4, "center": True, "factory": "IVF16,Flat"},
        "seed": 9, "patience": 3, "warmup": 0.25,
    }  # fmt: skip
    words = []
    for name, value in changed.items():
        flag = name.replace("_", "-")
        if isinstance(value, dict):
            words += [
                word
                for key, item in value.items()
                for word in ("--index-option", f"{key}={json.dumps(item)}")
            ]
        elif isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", ",".join(map(str, value)) if isinstance(value, list) else value]
    assert settings_of(invoke, *words) == TrainConfig().to_mapping() | changed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--epochs", "0"), "The 'epochs' setting must be a whole number at least 1. Got 0 instead."),
        (("--epochs", "two"), "'two' is not a valid integer"),
        (("--learning-rate", "nan"), "The 'learning_rate' setting must be a number at least 0.0"),
        (("--mode", "magic"), "'magic' is not one of"),
        (("--dense-widths", "8,x"), "'8,x' is not a list of whole numbers"),
        (("--preset", "slid"), "'slid' is not one of"),
        (("--epoch", "3"), "No such option '--epoch'"),
        (("--index-option", "bits"), "'bits' is not a setting such as tables=20."),
        (("--config", "missing.toml"), "missing.toml: cannot be read"),
        (("--config", "."), "cannot be read"),
        (("--config", "broken.toml"), "broken.toml: is not valid TOML"),
        (("--config", "unknown.toml"), "There is no setting 'epoch'. Did you mean 'epochs'?"),
        (
            ("--config", "type.toml"),
            "The 'epochs' setting must be a whole number at least 1. Got '5' instead.",
        ),
        (("--threads", "1000"), "The 'threads' setting must be at most"),
    ],
)
def test_wrong_settings(invoke, easy_data, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.toml").write_text("epochs = = 3")
    (tmp_path / "unknown.toml").write_text("epoch = 3")
    (tmp_path / "type.toml").write_text("epochs = '5'")
    before = listing(tmp_path)
    result = invoke("train", easy_data.path, "--out", "run", *words, code=2)
    assert message in result.stderr
    assert listing(tmp_path) == before


def test_training_logs_to_standard_error_without_escape_codes(invoke, easy_data, tmp_path):
    result = invoke(
        "train",
        easy_data.path,
        "--out",
        tmp_path / "run",
        "--mode",
        "exact",
        "--max-steps",
        4,
        "--report-every",
        2,
    )
    assert result.stdout == ""
    assert "step 2 |" in result.stderr
    assert "validation P@1" in result.stderr
    assert result.stderr.rstrip().endswith(f"trained: {tmp_path / 'run'}")
    assert "\x1b" not in result.stderr
    assert "\r" not in result.stderr


def test_resume_takes_the_settings_of_the_run(invoke, easy_data, tmp_path):
    out = tmp_path / "run"
    words = ("train", easy_data.path, "--out", out, "--preset", "demo", "--batch-size", 100, "--max-steps")
    invoke(*words, 3)
    invoke(*words, 5, "--resume")  # the same line
    invoke("train", easy_data.path, "--out", out, "--max-steps", 7, "--resume")
    assert list_checkpoints(out / "checkpoints")[-1].step == 7
    result = invoke("train", easy_data.path, "--out", out, "--resume", "--batch-size", 50, code=1)
    assert "cannot be resumed with batch_size = 50; the run has 100" in result.stderr
    result = invoke("train", easy_data.path, "--out", tmp_path / "no run", "--resume", code=1)
    assert "no run: is no run directory: it has no run.json" in result.stderr
    assert listing(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--index simhsh", "'index' setting must be one of none, "),
        ("--index simhsh", "Got 'simhsh' instead. Did you mean 'simhash'?"),
        ("--index-option tabels=3", "'tabels' setting is unknown to the 'simhash' index"),
        ("--index-option tables=0", "'tables' parameter of "),
        ("--index none --index-option bits=3", "'index_options' setting must be empty where 'index' is none"),
        ("--batch-share 0.2", "'batch_share' setting must be 0 in {mode} mode"),
        ("--batch-share 0.6", "'batch_share' setting must be at most 1 - 'random_share' (0.5). Got 0.6"),
    ],
)
@pytest.mark.parametrize("mode", ["exact", "shared"])
def test_settings_that_do_not_fit_are_refused_before_anything_is_written(
    invoke, easy_data, tmp_path, mode, words, message
):
    out = tmp_path / "run"
    result = invoke("train", easy_data.path, "--out", out, "--mode", mode, *words.split(), code=2)
    assert message.format(mode=mode) in result.stderr
    assert listing(tmp_path) == []


def test_a_collapse_is_shown_as_one_line(invoke, easy_data, tmp_path):
    mixture = [
        "--mode",
        "per_sample",
        "--index",
        "none",
        "--random-power",
        "1",
        "--active-size",
        "1",
        "--batch-share",
        "0",
    ]
    small = ("--max-steps", 10, "--batch-size", 100, "--hidden-width", 8, "--threads", 1)
    original = CollapseWatch.epoch_ended
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            CollapseWatch, "epoch_ended", lambda watch, epoch, steps, _: original(watch, epoch, steps, 0.001)
        )
        result = invoke("train", easy_data.path, "--out", tmp_path / "run", *mixture, *small)
    told = [line for line in result.stderr.splitlines() if "were negatives" in line]
    assert len(told) == 1
    assert told[0].startswith("warning: step 10: only 0.1 % of the classes were negatives in epoch 1;")
    assert "'active_size' (now 1)" in told[0]


def test_a_diverging_loss_has_its_own_exit_code(invoke, easy_data, tmp_path):
    extreme = {
        "mode": "exact",
        "learning-rate": 10,
        "epochs": 200,
        "lr-schedule": "constant",
        "hidden-width": 512,
    }
    extreme |= {"weight-decay": 1, "beta2": 0, "epsilon": 1e-16, "valid-every": 100000}
    words = [word for name, value in extreme.items() for word in (f"--{name}", value)]
    result = invoke("train", easy_data.path, "--out", tmp_path / "run", *words, code=4)
    assert "its update was not applied" in result.stderr


@pytest.mark.parametrize(
    ("data", "out", "code", "message"),
    [
        ("missing", "run", 3, "missing: expected a prepared data set, found no meta.json"),
        ("file", "run", 3, "file: expected the directory of a prepared data set"),
        ("damaged", "run", 3, "meta.json: expected JSON"),
        ("easy", "file/run", 1, "file: "),
        ("easy", "occupied", 1, "occupied: exists already"),
        ("easy", "file", 1, "file: exists already"),
    ],
)
def test_wrong_directories(invoke, easy_data, tmp_path, monkeypatch, data, out, code, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "easy").symlink_to(easy_data.path)
    (tmp_path / "file").write_text("")
    for name in ("damaged/meta.json", "occupied/something"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{")
    before = listing(tmp_path)
    result = invoke("train", data, "--out", out, "--mode", "exact", "--max-steps", 1, code=code)
    assert message in result.stderr
    assert listing(tmp_path) == before


def test_a_full_disk_at_the_start_leaves_no_run(invoke, easy_data, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device", "class_counts.npy")

    monkeypatch.setattr("slidex.train.run.np.save", fail)
    result = invoke("train", easy_data.path, "--out", tmp_path / "run", "--mode", "exact", code=1)
    assert result.stderr == "Error: class_counts.npy: No space left on device.\n"
    assert listing(tmp_path) == []


# eval


def test_eval(invoke, easy_data, trained):
    result = invoke("eval", trained, easy_data.path)
    assert f"{trained} on {easy_data.path}, test split, exact scoring" in result.stdout
    assert result.stderr == ""
    exact = json.loads(invoke("eval", trained, easy_data.path, "--exact", "--k", "2,1,2", "--json").stdout)
    assert exact["scoring"] == "exact"
    assert exact["P@1"] > 0.9
    assert {name for name in exact if name.startswith("P@")} == {"P@1", "P@2"}
    found = json.loads(
        invoke("eval", trained, easy_data.path, "--index", "--split", "valid", "--json").stdout
    )
    assert (found["scoring"], found["rows"]) == ("index", 100)
    assert found["P@1"] > 0.9


@pytest.mark.parametrize("ks", ["0", "1,0", "-1", "", "1;3", "a"])
def test_bad_cut_offs(invoke, easy_data, trained, ks):
    result = invoke("eval", trained, easy_data.path, "--k", ks, code=2)
    assert "must be whole numbers of at least 1, such as 1,3,5" in result.stderr


def test_more_classes_asked_for_than_there_are(invoke, easy_data, trained, text_run):
    result = json.loads(invoke("eval", trained, easy_data.path, "--k", "1,1000", "--json").stdout)
    assert result["recall@1000"] == 1.0
    line = invoke("predict", text_run, "-", "--k", 99, input="apple").stdout
    assert len(json.loads(line)["classes"]) == 5


def test_data_of_another_size(invoke, easy_data, trained, text_run):
    data = text_run.parent / "data"
    result = invoke("eval", trained, data, code=3)
    assert f"{data}: has 5 classes; the run {trained} was trained on 300." in result.stderr
    result = invoke("predict", trained, data, code=3)
    assert f"features; the run {trained} was trained on 320." in result.stderr


def test_missing_splits_and_indexes(invoke, easy_data, text_run):
    data = text_run.parent / "data"
    assert "expected a split named 'dev'" in invoke("eval", text_run, data, "--split", "dev", code=3).stderr
    assert "was trained without an index" in invoke("eval", text_run, data, "--index", code=2).stderr
    assert "was trained without an index" in invoke("predict", text_run, data, "--index", code=2).stderr


# predict


def test_predict_a_prepared_set(invoke, easy_data, trained):
    found = records(invoke("predict", trained, easy_data.path, "--k", 2).stdout)
    assert [record["row"] for record in found] == list(range(200))
    labels = easy_data.split("test").y
    hits = sum(
        record["classes"][0]["id"] in labels.indices[labels.indptr[row] : labels.indptr[row + 1]]
        for row, record in enumerate(found)
    )
    assert hits > 180
    best = found[0]["classes"][0]
    assert best["name"] == f"class {best['id']}"
    indexed = records(invoke("predict", trained, easy_data.path, "--index", "--k", 2).stdout)
    pairs = [
        ({c["id"] for c in a["classes"]}, {c["id"] for c in b["classes"]})
        for a, b in zip(found, indexed, strict=True)
    ]
    assert sum(len(a & b) for a, b in pairs) > 200


def test_predict_an_xmc_file_like_the_prepared_set(invoke, files, easy_data, trained):
    from_file = records(invoke("predict", trained, "test.txt").stdout)
    from_set = records(invoke("predict", trained, easy_data.path).stdout)
    assert from_file == from_set[:60]


def test_predict_text(invoke, files, text_run):
    from_file = records(invoke("predict", text_run, "test.jsonl", "--k", 2).stdout)
    texts = [json.loads(line)["text"] for line in (files / "test.jsonl").read_text().splitlines()]
    for ending in ("\n", "\r\n"):
        from_stdin = records(invoke("predict", text_run, "-", "--k", 2, input=ending.join(texts)).stdout)
        assert from_stdin == from_file
    topics = [{c["name"] for c in record["classes"]} & {"fruit", "metal", "sky"} for record in from_file]
    assert topics[:3] == [{"fruit"}, {"metal"}, {"sky"}]
    both = records(invoke("predict", text_run, "test.jsonl", "--text-field", "title,text").stdout)
    assert len(both) == 30
    assert invoke("predict", text_run, "-", input="").stdout == ""


def test_names_that_are_not_ascii_come_out_as_utf8(invoke, tmp_path):
    lines = [json.dumps({"text": "snow rain", "labels": ["Übung", "\ud800"]}) for _ in range(8)]
    (tmp_path / "items.jsonl").write_text("\n".join(lines))
    invoke("prepare", "jsonl", tmp_path / "items.jsonl", "--out", tmp_path / "data")
    invoke("train", tmp_path / "data", "--out", tmp_path / "run", "--mode", "exact", "--max-steps", 1)
    result = invoke("predict", tmp_path / "run", "-", input="snow")
    assert "Übung".encode() in result.stdout_bytes
    assert {c["name"] for c in json.loads(result.stdout_bytes)["classes"]} == {"Übung", "\ud800"}
    invoke("predict", tmp_path / "run", "-", "--output", tmp_path / "out", input="snow")
    assert (tmp_path / "out").read_bytes() == result.stdout_bytes
    assert r"\ud800" in invoke("inspect", tmp_path / "data").stdout


def test_output_is_a_whole_file_or_none(invoke, files, trained):
    result = invoke("predict", trained, "test.txt", "--output", "found.jsonl")
    assert result.stdout == ""
    whole = (files / "found.jsonl").read_text()
    assert len(records(whole)) == 60
    lines = (files / "test.txt").read_text().splitlines()
    (files / "cut.txt").write_text("\n".join(lines[:40]))
    before = listing(files)
    invoke("predict", trained, "cut.txt", "--output", "found.jsonl", code=3)
    invoke("predict", trained, "cut.txt", "--output", "other.jsonl", code=3)
    assert listing(files) == before
    assert (files / "found.jsonl").read_text() == whole


def test_output_through_a_link_and_to_what_is_no_file(invoke, files, trained):
    (files / "link").symlink_to("real.jsonl")
    invoke("predict", trained, "test.txt", "--output", "link")
    assert (files / "link").is_symlink()
    assert len(records((files / "real.jsonl").read_text())) == 60
    invoke("predict", trained, "test.txt", "--output", os.devnull)
    assert not (files / os.devnull).is_file()


@pytest.mark.parametrize(
    ("words", "stdin", "code", "message"),
    [
        ("nowhere", None, 3, "nowhere: does not exist."),
        ("src", None, 3, "src: expected a prepared data set, found no meta.json"),
        ("test.csv", None, 3, "test.csv:1: expected a header"),
        ("test.jsonl --text-field words", None, 3, "test.jsonl:1: expected a field 'words'"),
        ("test.jsonl --k 0", None, 2, "0 is not in the range x>=1"),
        ("- --k 2", b"fine\nbad \xff\n", 3, "<stdin>:2:5: expected UTF-8"),
        ("- --k 2", b"fine\n" + 200_000 * b"x" + b"\xff", 3, "<stdin>:2:200001: expected UTF-8"),
        ("test.jsonl --output no/such/folder", None, 1, "No such file or directory"),
        ("test.jsonl --output src", None, 2, "'src' is a directory"),
        ("test.txt", None, 3, "test.txt:1: expected 12 features as the model has, found 320"),
    ],
)
def test_wrong_predictions(invoke, files, text_run, words, stdin, code, message):
    before = listing(files)
    result = invoke("predict", text_run, *words.split(), code=code, input=stdin)
    assert message in result.stderr
    assert listing(files) == before


def test_text_needs_a_model_made_from_text(invoke, files, trained):
    for source in ("-", "test.jsonl"):
        result = invoke("predict", trained, source, input="a", code=2)
        assert "its data set was not made from text" in result.stderr
