"""`presets` and `config`: bundled settings, what each key means, checks and copies."""

import json
import shlex
import tomllib

import pytest
from called_commands import answer_of, refusal_of

from metagmvae.configs.describe import describe_settings
from metagmvae.configs.load import load_settings, presets, setting_keys
from metagmvae.infra.cli import main


def test_presets_are_listed_with_recorded_accuracy(capsys):
    rows = {row["preset"]: row for row in answer_of("presets")["presets"]}
    assert list(rows) == presets()
    assert rows["omniglot-best-5way"]["(5,1)"].startswith("99.")
    assert rows["omniglot-5way-paper"]["(5,1)"] == ""
    assert all(row["data"] and row["hardware"] and row["time"] and row["trains"] for row in rows.values())
    assert main(["presets"]) == 0
    assert "omniglot-cpu" in capsys.readouterr().out


def test_every_setting_is_explained():
    described = describe_settings(load_settings("omniglot-cpu"))
    assert [item.key for item in described] == setting_keys()
    assert [item.key for item in described if not item.text] == []


def test_explain_names_value_default_choices_and_change(capsys):
    (item,) = answer_of("config", "explain", "omniglot-cpu", "adapt.e_step")["settings"]
    assert (item["value"], item["default"], item["changed"]) == ("identity", "diagonal", True)
    assert item["choices"] == ["diagonal", "identity"]
    keys = [item["key"] for item in answer_of("config", "explain", "omniglot-cpu", "train")["settings"]]
    assert keys == [key for key in setting_keys() if key.startswith("train.")]
    assert main(["config", "explain", "omniglot-cpu", "--set", "train.steps=7"]) == 0
    text = capsys.readouterr().out
    assert "* train.steps = 7 (default: 60000)" in text
    assert "  train.batch = 4\n" in text
    assert max(map(len, text.splitlines())) <= 100


def test_show_prints_toml_that_reads_back(capsys):
    assert main(["config", "show", "omniglot-cpu", "--set", "train.steps=7"]) == 0
    settings = load_settings("omniglot-cpu", ["train.steps=7"])
    assert tomllib.loads(capsys.readouterr().out) == settings.model_dump(mode="json")


def test_copy_keeps_the_comments_and_replaces_nothing(tmp_path):
    file = tmp_path / "mine.toml"
    assert answer_of("config", "copy", "omniglot-cpu", str(file))["next"] == f"metagmvae train {file}"
    assert file.read_text().startswith("# Omniglot on a laptop")
    assert load_settings(file) == load_settings("omniglot-cpu")
    before = file.read_bytes()
    assert f"{file}: exists already; choose another file" in refusal_of("config", "copy", "omniglot-5way", file)
    assert file.read_bytes() == before
    changed = tmp_path / "changed.toml"
    assert main(["config", "copy", str(file), str(changed), "--set", "train.steps=7"]) == 0
    assert load_settings(changed) == load_settings("omniglot-cpu", ["train.steps=7"])


def test_the_next_command_can_be_pasted(tmp_path):
    file = tmp_path / "my settings" / "one's own.toml"
    assert shlex.split(answer_of("config", "copy", "omniglot-cpu", str(file))["next"]) == [
        *("metagmvae", "train"),
        str(file),
    ]


def test_validate(tmp_path, capsys):
    assert answer_of("config", "validate", "omniglot-cpu")["changed"] > 5
    (tmp_path / "bad.toml").write_text("[train]\nlr = 1\n")
    assert main(["config", "validate", str(tmp_path / "bad.toml")]) == 2
    assert "train.lr: no such key; did you mean 'train.learning_rate'?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["show", "nothing"], "nothing: no such TOML file and no preset of that name"),
        (["explain", "omniglot-cpu", "lr"], "did you mean 'pretrain.learning_rate' or 'train.learning_rate'?"),
        (["show", "omniglot-cpu", "--set", "train.steps=x"], 'train.steps = "x"'),
    ],
)
def test_wrong_requests_are_one_line(words, error):
    assert error in refusal_of("config", *words)


def test_an_unknown_action_gets_a_suggestion():
    assert "'shwo' is no command; did you mean 'show'?" in refusal_of("config", "shwo", "omniglot-cpu")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"steps = \xff", "not UTF-8 text (invalid start byte at byte 8)"),
        (b"steps = " + b"9" * 5000, "not valid TOML: an integer of thousands of digits"),
        (b"a = " + b"[" * 5000, "not valid TOML: nested too deeply"),
        (b"#" * 2**21, "larger than 1,048,576 bytes"),
        (b"steps = ", "not valid TOML: Invalid value"),
    ],
)
def test_files_that_are_no_settings_are_one_line(tmp_path, content, reason):
    (tmp_path / "bad.toml").write_bytes(content)
    line = refusal_of("config", "validate", tmp_path / "bad.toml")
    assert f"bad.toml: {reason}" in line
    assert "set_int_max" not in line


PLAN = {"name": "x", "task": "5w1s", "space": {"train.steps": {"kind": "int", "low": 1, "high": 5}}}


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        (PLAN, "sweep.json: base is missing"),
        (PLAN | {"base": 7}, "sweep.json: base = 7"),
        (PLAN | {"base": {"train": 7}}, "sweep.json: base: train = 7: a table of keys and values is needed"),
        (PLAN | {"base": {}, "data_fingerprint": 7}, "sweep.json: data_fingerprint = 7"),
    ],
)
def test_a_sweep_with_a_broken_plan_is_one_line(tmp_path, plan, reason):
    (tmp_path / "sweep.json").write_text(json.dumps(plan))
    assert reason in refusal_of("compare", tmp_path)


def test_the_demo_needs_a_folder(capsys):
    assert main(["demo", "--out", "/dev/null"]) == 2
    assert capsys.readouterr().err == "metagmvae demo: /dev/null: no empty folder; give a new folder with --out\n"
