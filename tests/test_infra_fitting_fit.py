"""`metagmvae fit` from a folder of pictures to a model package and a report, with a tiny budget."""

import html
import json
import shlex
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from called_commands import answer_of, refusal_of
from PIL import Image
from small_fit import commands, few_steps, fit, write_glyphs

import metagmvae
from metagmvae.infra.cli import main
from metagmvae.infra.fitting import fit as fit_module
from metagmvae.infra.fitting.fit_state import FitState

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module", autouse=True)
def _short():
    """As few steps as possible."""
    with few_steps():
        yield


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """Options for an encoder of timm with random weights to compare with."""
    file = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.manual_seed(0)
    torch.save(pytest.importorskip("timm").create_model("test_resnet", pretrained=False).state_dict(), file)
    return ["--encoder", "timm:test_resnet", "--weights", str(file), "--image-size", "32"]


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, frozen):
    """Folder of pictures with 8 classes, output folder, answer, and lines on standard error."""
    root = tmp_path_factory.mktemp("fit")
    pictures, model = write_glyphs(root / "letters", 8, 9), root / "model"
    code, answer, lines = fit(pictures, "--out", model, "--record", root / "record.json", *frozen)
    assert code == 0, lines
    return pictures, model, answer, lines


def test_it_says_what_it_finds_and_does(fitted):
    pictures, model, answer, lines = fitted
    assert lines[0].startswith("72 images, grey, 8 class folders")
    assert any(line.startswith("drawings of strokes") for line in lines)
    assert "2 classes are held out for validation and 2 for test" in "\n".join(lines)
    assert commands(lines) == ["prepare", "train", "evaluate", "classify"]
    assert any("too short" in line for line in lines)
    assert answer["samples"] == {"train": 36, "validation": 18, "test": 18}
    assert answer["classes"] == {"train": 4, "validation": 2, "test": 2}
    (row,) = answer["accuracy"]  # 9 drawings of a class: one shot only
    assert (row["way"], row["shot"], row["query"]) == (2, 1, 8)
    assert 0 <= row["accuracy"] <= 1
    assert 0 <= row["ece"] <= 1
    assert "nearest class mean" in {baseline["baseline"] for baseline in answer["baselines"]}
    assert {pair["episodes"] for pair in answer["paired"]} == {row["episodes"]}
    state = json.loads((model / "fit.json").read_text())
    assert state["schedule"]["pretrain_steps"] == 4
    assert state["plan"]["pictures"] == str(pictures)
    record = json.loads((model.parent / "record.json").read_text())
    assert record["environment"]["versions"]["metagmvae"]
    assert record["accuracy"] == answer["accuracy"]
    assert record["schedule"] == state["schedule"]


def test_the_commands_do_the_same(fitted, tmp_path):
    """The printed `prepare` gives the same data set."""
    _, model, _, lines = fitted
    line = next(line for line in lines if line.startswith("$ metagmvae prepare"))
    words = line.removeprefix("$ metagmvae ").split()
    words[words.index("--out") + 1] = str(tmp_path / "again")
    answer_of(*words)
    for name in ("dataset.json", "test/index.parquet"):
        assert (tmp_path / "again" / name).read_bytes() == (model / "data" / name).read_bytes()


def test_the_output_is_a_model_package_that_takes_original_pictures(fitted, capsys):
    pictures, model, answer, _ = fitted
    loaded = metagmvae.load_model(model)
    assert loaded.image_shape == (1, 28, 28)
    assert loaded.preprocessing.invert
    settings = json.loads((model / "run" / "settings.json").read_text())
    assert settings["tracking"]["register_as"] == "letters"
    names = sorted(path.name for path in pictures.iterdir())[:2]
    X = np.stack([np.asarray(Image.open(file)) for name in names for file in sorted((pictures / name).iterdir())])
    y = np.repeat(names, 9)
    classifier = metagmvae.FewShotClassifier(model, preprocessed=False).fit(X[::2], y[::2])
    assert set(classifier.predict(X[1::2])) <= set(names)
    example = model / "example"
    assert main(["classify", str(model), "--support", f"{example}/labelled", "--query", f"{example}/queries"]) == 0
    assert len(list((example / "queries").iterdir())) == 8
    assert answer["example"].endswith("of 8 files right")
    assert answer["next"].startswith(f"metagmvae classify {model}")


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_shows_everything_on_one_page(fitted):
    _, model, answer, _ = fitted
    page = _Page((model / "report.html").read_text())
    text = " ".join(" ".join(page.text).split())
    for words in (
        "72 images, grey",
        "nearest class mean",
        "soft k-means",
        "metagmvae prepare folder",
        "calibration error",
    ):
        assert words in text, words
    accuracy = answer["accuracy"][0]["accuracy"]
    assert f"{100 * accuracy:.2f} ±" in text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2, "reliability diagram and example"
    assert all(image["src"].startswith("data:image/") for image in images)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert [a["id"] for tag, a in page.tags if tag == "section" and "id" in a] == [
        "found",
        "accuracy",
        "encoder",
        "calibration",
        "time",
        "commands",
    ]


@pytest.mark.browser
def test_the_report_in_a_browser(fitted):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    _, model, _, _ = fitted
    probe = model.parent / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,2400", f"--screenshot={probe}"]
    subprocess.run([browser, *options, f"file://{model}/report.html"], check=True, capture_output=True, timeout=300)
    pixels = np.asarray(Image.open(probe).convert("L"))
    assert (pixels < 100).sum() > 10_000, "text and figures"


def test_the_trained_model_is_compared_with_the_frozen_encoder(fitted, frozen):
    """The differences are those of `compare`, whose commands stand in the report."""
    _, model, answer, lines = fitted
    assert "comparison with the frozen encoder timm:test_resnet" in lines
    rows, (accuracy,) = answer["frozen encoder"], answer["accuracy"]
    assert [(row["head"], row["head_mode"]) for row in rows] == [
        ("nearest-mean", "inductive"),
        ("soft-k-means", "transductive"),
    ]
    report = (model / "report.html").read_text()
    compare = [line for line in json.loads((model / "fit.json").read_text())["commands"] if " compare " in line]
    for row, command in zip(rows, compare, strict=True):
        assert row["challenger"] == pytest.approx(accuracy["accuracy"])
        assert html.escape(command) in report
        (pair,) = answer_of(*shlex.split(command)[1:])["paired"]
        assert (pair["difference"], pair["ci95"]) == (row["difference"], row["ci95"])
        assert f"{100 * row['champion']:.2f}" in report
    assert "Does training beat the frozen encoder?" in report
    words = {"better": "beats", "worse": "is worse than", "undecided": "cannot be told apart from"}
    best = max(rows, key=lambda row: row["champion"])
    assert f"Training {words[best['verdict']]} the frozen encoder timm:test_resnet with {best['head']}" in report


def test_an_older_state_without_later_options_is_read(fitted):
    _, model, _, _ = fitted
    state = json.loads((model / "fit.json").read_text())
    later = {"encoder": None, "crop": True, "labels": None, "labels_sha256": None, "groups": None}
    later |= {"group_division": "", "table_note": ""}
    for key in later:
        del state["plan"][key]
    plan = FitState.model_validate_json(json.dumps(state)).plan
    assert {key: getattr(plan, key) for key in later} == later


def test_again_it_does_nothing_and_with_other_options_it_refuses(fitted, frozen, tmp_path):
    pictures, model, answer, _ = fitted
    code, again, lines = fit(pictures, "--out", model, *frozen)
    assert code == 0
    assert again["accuracy"] == answer["accuracy"]
    assert again["state"].startswith("finished earlier")
    assert commands(lines) == []
    code, _, lines = fit(pictures, "--out", model, "--seed", 1, *frozen)
    assert (code, len(lines)) == (2, 1)
    assert "seed differ" in lines[0]
    code, _, lines = fit(pictures, "--out", model)
    assert (code, len(lines)) == (2, 1)
    assert "encoder differ" in lines[0]
    code, _, lines = fit(pictures, "--out", model, "--no-crop", *frozen)
    assert (code, len(lines)) == (2, 1)
    assert "crop differ" in lines[0]
    more = tmp_path / "letters"
    shutil.copytree(pictures, more)
    shutil.copy(next(more.rglob("*.png")), more / next(more.iterdir()).name / "more.png")
    code, _, lines = fit(more, "--out", model)
    assert (code, len(lines)) == (2, 1)
    assert "content" in lines[0]


def test_an_interrupted_command_continues(tmp_path, monkeypatch):
    pictures = write_glyphs(tmp_path / "letters", 8, 9)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fit_module, "evaluate_all", stop)
        code, _, lines = fit(pictures, "--out", tmp_path / "model")
    assert code == 130
    assert lines[-1].endswith(f"the same command continues in {tmp_path / 'model'}")
    assert commands(lines) == ["prepare", "train"]
    assert not (tmp_path / "model" / "report.html").exists()
    code, answer, lines = fit(pictures, "--out", tmp_path / "model")
    assert code == 0
    assert commands(lines) == ["evaluate", "classify"]
    assert len(answer["accuracy"]) == 1
    shown = (tmp_path / "model" / "report.html").read_text()
    assert all(f"metagmvae {name}" in shown for name in ("prepare", "train", "evaluate", "classify"))


@pytest.mark.slow
def test_a_flat_folder_with_labelled_pictures(tmp_path):
    pictures = write_glyphs(tmp_path / "flat", 6, 8, flat=True)
    code, answer, lines = fit(pictures, "--out", tmp_path / "plain", "--no-crop")
    assert code == 0, lines
    assert any("no classes are held out" in line for line in lines)
    assert any("28 x 28 pixels, grey, inverted, so that strokes are bright, not cropped" in line for line in lines)
    assert metagmvae.load_model(tmp_path / "plain").preprocessing.crop == "none"
    assert commands(lines) == ["prepare", "train"]
    assert [row["on"] for row in answer["accuracy"]] == ["augmented views of training images, no classes"] * 2
    assert answer["classes"] == {"train": 0}
    labelled = write_glyphs(tmp_path / "labelled", 3, 5)
    code, answer, lines = fit(pictures, "--out", tmp_path / "model", "--labelled", labelled)
    assert code == 0, lines
    assert commands(lines) == ["prepare", "train", "prepare", "evaluate", "classify"]
    (row,) = answer["accuracy"]
    assert (row["on"], row["way"], row["shot"], row["query"]) == ("labelled pictures", 3, 1, 4)
    assert answer["example"].endswith("of 12 files right")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["missing"], "PICTURES missing: no such folder or archive"),
        (["empty"], "contains no images"),
        (["few"], "has 3 images, but at least 32"),
        (["good", "--budget", "soon"], "--budget soon: write a time as 90s"),
        (["good", "--budget", "0m"], "--budget 0m: give a time from 1 second"),
        (["good", "--seed", "-1"], "--seed is -1"),
        (["good", "--labelled", "few"], "needs two or more class folders"),
        (["good", "--labelled", "missing"], "--labelled missing: no such folder"),
        (["good", "--out", "few"], "exists and is not of metagmvae fit"),
        (["good", "--out", "few/0.png"], "exists and is not of metagmvae fit"),
        (["good", "--out", "few/0.png/x"], "cannot be created"),
        (["good", "--record", "few"], "few"),
        (["mixed"], "both contain images"),
        (["good", "--out", "good/model"], "lies in the source"),
        (["good", "--out", "good"], "lies in the source"),
        (["good", "--encoder", "conv4"], "--encoder conv4: is compared on classes that are not trained on"),
        (["good", "--encoder", "nothing"], "--encoder nothing: not the name of an encoder"),
        (["good", "--weights", "few/0.png"], "--weights: is for the encoder to compare with; add --encoder NAME"),
        (["good", "--image-size", "64"], "--image-size: is for the encoder to compare with"),
        (["good", "--encoder", "resnet18", "--weights", "few/0.png"], "few/0.png"),
        (["good", "--encoder", "resnet18", "--weights", "missing.pth"], "missing.pth: no such file"),
        (["many", "--encoder", "conv4"], "conv4: has no published weights"),
    ],
)
def test_wrong_requests_are_one_line_and_leave_nothing(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write_glyphs(tmp_path / "good", 5, 8)
    write_glyphs(tmp_path / "many", 8, 9)
    write_glyphs(tmp_path / "few", 1, 3, flat=True)
    shutil.copytree(tmp_path / "good", tmp_path / "mixed")
    shutil.copy(tmp_path / "few" / "000.png", tmp_path / "mixed")
    (tmp_path / "few" / "000.png").rename(tmp_path / "few" / "0.png")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert message in refusal_of("fit", *words, *([] if "--budget" in words else ["--budget", "2s"]))
    assert sorted(tmp_path.rglob("*")) == before


def test_too_many_broken_pictures_leave_nothing(tmp_path):
    pictures = write_glyphs(tmp_path / "in", 6, 8)
    for path in sorted(pictures.rglob("*.png"))[::5]:
        path.write_bytes(b"broken")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for out in ("empty", "new/models/out"):
        code, _, lines = fit(pictures, "--out", tmp_path / out)
        assert code == 2
        assert "cannot be decoded" in lines[-1]
        assert sorted(tmp_path.rglob("*")) == before


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(tmp_path):
    pictures = write_glyphs(tmp_path / "in", 8, 9)
    before = sorted(tmp_path.rglob("*"))
    code, answer, _ = fit(pictures, "--out", tmp_path / "out", "--dry-run")
    assert code == 0
    assert "preset strokes-cpu" in answer["will do"][-1]
    assert answer["found"][0].startswith("72 images")
    assert sorted(tmp_path.rglob("*")) == before
