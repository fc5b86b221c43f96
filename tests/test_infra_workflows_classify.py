"""Classification of image files: preprocessed like the training images, every file accounted for."""

import json
from dataclasses import replace
from pathlib import Path

import mlflow_template
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from calibrations import QUALITY, fits
from called_commands import answer_of
from PIL import Image

from metagmvae.infra.classification import answer_figure, task_inputs
from metagmvae.infra.cli import main
from metagmvae.infra.commands.parsing import format_answer
from metagmvae.infra.workflows import classify
from metagmvae.infra.workflows.classify import ClassifyOptions
from metagmvae.infra.workflows.estimator import FewShotClassifier
from metagmvae.pipelines.archives import folder
from metagmvae.pipelines.preprocessing import Preprocessing
from metagmvae.pipelines.records import DataError
from metagmvae.training.models.posterior_calibration import FittedBackground
from metagmvae.training.trainer.package import load_model, save_package

SHOTS = {"a": 3, "b": 1}


@pytest.fixture
def folders(tmp_path):
    """Folders of support and queries, and the images in the order in which they are read."""
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), dtype=np.uint8)
    paths = [f"support/{name}/{shot}.png" for name, shots in SHOTS.items() for shot in range(shots)]
    for path, image in zip([*paths, *(f"query/{p}.png" for p in range(3))], images, strict=True):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return tmp_path / "support", tmp_path / "query", images


@pytest.fixture
def loaded(tmp_path):
    return load_model(mlflow_template.new_run(tmp_path / "run"))


def test_probabilities_equal_those_of_the_transductive_classifier(folders, loaded, tmp_path):
    support, query, images = folders
    answer = run_classify(loaded, support, query, figure=tmp_path / "predictions.png")
    X = images.reshape(len(images), -1)
    expected = FewShotClassifier(loaded, mode="transductive").fit(X[:4], list("aaab")).predict_proba(X[4:])
    assert (answer["classes"], answer["shots"]) == (["a", "b"], [3, 1])
    assert [row["query"] for row in answer["queries"]] == ["0.png", "1.png", "2.png"]
    np.testing.assert_allclose([[row["a"], row["b"]] for row in answer["queries"]], expected, rtol=1e-6)
    assert all(row["probabilities"] == {"a": row["a"], "b": row["b"]} for row in answer["queries"])
    assert (answer["left_out"], answer["blank"]) == ([], [])
    assert (tmp_path / "predictions.png").is_file()


def test_model_runs_on_the_default_device(folders, loaded, monkeypatch):
    """The meta device computes shapes only: the features are made there, and drawing latents fails."""
    monkeypatch.setattr(classify, "default_device", lambda: torch.device("meta"))
    with pytest.raises(RuntimeError, match=r"(META|meta)"):
        classify.classify_folders(loaded, *folders[:2])
    assert next(loaded.model.parameters()).device.type == "meta"


def test_one_class_is_refused(folders, loaded, tmp_path):
    support, query, _ = folders
    (support / "b").rename(tmp_path / "b")
    with pytest.raises(DataError, match="two or more"):
        classify.classify_folders(loaded, support, query)


@pytest.fixture
def inverting(loaded):
    """The model, with the record that its training images were inverted, as those of `prepare omniglot`."""
    return replace(loaded, preprocessing=Preprocessing.of_shape(loaded.image_shape, invert=True))


def probabilities(answer) -> np.ndarray:
    return np.array([list(row["probabilities"].values()) for row in answer["queries"]])


def test_files_are_preprocessed_like_the_training_images(folders, loaded, inverting, tmp_path):
    """The package keeps the record; original files of any size give what the prepared arrays give."""
    support, query, images = folders
    for file in [*support.rglob("*.png"), *query.glob("*.png")]:
        Image.open(file).resize((56, 56), Image.Resampling.NEAREST).save(file)
    packaged = load_model(save_package(tmp_path / "package", inverting))
    answer = classify.classify_folders(packaged, support, query)
    assert answer["preprocessing"]["invert"]
    assert answer["preprocessing"]["recorded"]
    big = images.repeat(2, axis=1).repeat(2, axis=2)
    classifier = FewShotClassifier(packaged, mode="transductive", preprocessed=False).fit(big[:4], list("aaab"))
    np.testing.assert_array_equal(classifier.predict_proba(big[4:]).astype("f4"), probabilities(answer).astype("f4"))
    as_it_is = run_classify(packaged, support, query, invert=False)
    assert not np.array_equal(probabilities(as_it_is), probabilities(answer))
    old = classify.classify_folders(loaded, support, query)
    assert not old["preprocessing"]["recorded"]
    np.testing.assert_array_equal(probabilities(old), probabilities(as_it_is))


def test_a_model_without_the_record_is_warned_about_in_one_line(folders, inverting, loaded, tmp_path, capsys):
    support, query, _ = folders
    package = {name: str(save_package(tmp_path / name, model)) for name, model in (("new", inverting), ("old", loaded))}

    def run(name, *options):
        command = ["classify", package[name], "--support", str(support), "--query", str(query), "--json", *options]
        assert main(command) == 0
        printed = capsys.readouterr()
        return json.loads(printed.out)["preprocessing"]["invert"], printed.err

    assert run("new") == (True, "")
    assert run("new", "--no-invert") == (False, "")
    assert run("old", "--invert") == (True, "")
    invert, warning = run("old")
    assert not invert
    assert warning.count("\n") == 1
    assert "give --invert or --no-invert" in warning


def test_no_class_name_overwrites_the_answer(folders, loaded, capsys, tmp_path):
    support, query, _ = folders
    (support / "a").rename(support / "query")
    (support / "b").rename(support / "class")
    answer = classify.classify_folders(loaded, support, query)
    assert [row["query"] for row in answer["queries"]] == ["0.png", "1.png", "2.png"]
    for row in answer["queries"]:
        assert row["class"] == max(row["probabilities"], key=row["probabilities"].get)
        assert row["probabilities"].keys() == {"class", "query"}
    package = str(save_package(tmp_path / "package", loaded))
    assert main(["classify", package, "--support", str(support), "--query", str(query), "--invert"]) == 0
    assert "class 0." in capsys.readouterr().out


def test_renaming_the_classes_does_not_change_the_probabilities(folders, loaded):
    support, query, _ = folders
    before = probabilities(classify.classify_folders(loaded, support, query))
    (support / "a").rename(support / "z")
    after = probabilities(classify.classify_folders(loaded, support, query))
    np.testing.assert_array_equal(after[:, ::-1], before)


def test_every_file_is_accounted_for(folders, loaded):
    """Further formats and images without a suffix are read; what is left out is named with the reason."""
    support, query, _ = folders
    Image.open(query / "0.png").save(query / "3.tif")
    (query / "1.png").rename(query / "image")
    Image.new("L", (28, 28), 7).save(query / "blank.bmp")
    (query / "notes.txt").write_text("not an image")
    (query / "more").mkdir()
    Image.new("L", (28, 28)).save(query / "more" / "4.png")
    Image.new("L", (28, 28)).save(support / "stray.png")
    answer = classify.classify_folders(loaded, support, query)
    assert [row["query"] for row in answer["queries"]] == ["0.png", "2.png", "3.tif", "blank.bmp", "image"]
    assert {file["file"]: file["reason"] for file in answer["left_out"]} == {
        f"{support}/stray.png": "not in a class folder",
        f"{query}/more/4.png": "in a sub-folder",
        f"{query}/notes.txt": "suffix .txt",
    }
    assert answer["blank"] == [f"{query}/blank.bmp"]


def test_a_table_names_the_labelled_images_of_one_folder(folders, loaded, tmp_path):
    """The same answer as with class folders; the images without a row are queries only."""
    support, query, _ = folders
    (tmp_path / "all" / "more").mkdir(parents=True)
    rows = ["Image;Class"]
    for path in sorted(support.rglob("*.png")):
        name = f"{path.parent.name} {path.name}"
        (tmp_path / "all" / ("more" if "1" in name else "") / name).write_bytes(path.read_bytes())
        rows.append(f"{name};{path.parent.name}")
    (tmp_path / "all" / "0.png").write_bytes((query / "0.png").read_bytes())
    table = tmp_path / "labels.csv"
    table.write_text("\ufeff" + "\r\n".join(reversed(rows[1:])).join([rows[0] + "\r\n", ""]), encoding="utf-8")
    expected = classify.classify_folders(loaded, support, query)
    answer = run_classify(loaded, tmp_path / "all", query, labels=table)
    assert answer["queries"] == expected["queries"]
    assert (answer["classes"], answer["shots"], answer["left_out"]) == (["a", "b"], [3, 1], [])
    run = save_package(tmp_path / "package", loaded)
    words = ["classify", str(run), "--support", str(tmp_path / "all"), "--labels", str(table), "--query", str(query)]
    assert answer_of(*words, "--no-invert")["queries"] == expected["queries"]
    table.write_text("file,label\n0,a\n")
    with pytest.raises(DataError, match=r"labels.csv: has 1 class \(a\); give two or more"):
        run_classify(loaded, tmp_path / "all", query, labels=table)
    table.write_text("file,label\n0,a\nnone.png,b\n")
    with pytest.raises(DataError, match=r"1 of 2 rows name no image of the folder \(none.png\)"):
        run_classify(loaded, tmp_path / "all", query, labels=table)


def test_folders_without_images_are_refused(folders, loaded, tmp_path):
    support, query, _ = folders
    with pytest.raises(DataError, match="no such folder"):
        classify.classify_folders(loaded, tmp_path / "missing", query)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="contains no images"):
        classify.classify_folders(loaded, support, tmp_path / "empty")
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.dcm").write_bytes(b"DICM")
    with pytest.raises(DataError, match=r"it has 1 with suffix \.dcm; convert them \(DICOM, NIfTI\) to PNG or TIFF"):
        classify.classify_folders(loaded, support, tmp_path / "scans")
    with pytest.raises(DataError, match="holds images in sub-folders only; give one of them, or --recursive"):
        classify.classify_folders(loaded, support, support)
    (support / "c").mkdir()
    with pytest.raises(DataError, match="class folder c holds no images"):
        classify.classify_folders(loaded, support, query)


def test_a_folder_whose_files_come_and_go(folders, loaded, tmp_path, monkeypatch):
    """A file that is removed while the folder is listed, one before it is read, one before the figure; a half file."""
    support, query, _ = folders
    image = (query / "0.png").read_bytes()
    for name in ("gone.png", "gone", "later.png"):
        (query / name).write_bytes(image)
    (query / "half.png").write_bytes(image[: len(image) // 2])
    kind_of, read, draw = folder._kind, task_inputs.read_entry, classify.draw_answer
    removed = {"gone.png", "gone"}

    def kind(path):
        if path.name in removed:
            path.unlink()
        return kind_of(path)

    def read_entry(root, name):
        (query / "later.png").unlink(missing_ok=True)
        return read(root, name)

    def draw_answer(*arguments):
        (query / "1.png").unlink()
        draw(*arguments)

    monkeypatch.setattr(folder, "_kind", kind)
    monkeypatch.setattr(task_inputs, "read_entry", read_entry)
    monkeypatch.setattr(classify, "draw_answer", draw_answer)
    answer = run_classify(loaded, support, query, figure=tmp_path / "figure.png")
    assert [row["query"] for row in answer["queries"]] == ["0.png", "1.png", "2.png"]
    reasons = {Path(row["file"]).name: row["reason"] for row in answer["left_out"]}
    assert sorted(reasons) == ["gone", "gone.png", "half.png", "later.png"]
    assert reasons["gone.png"] == reasons["gone"] == "removed while the folder was listed"
    assert "No such file" in reasons["later.png"]
    assert "broken image" in reasons["half.png"]
    assert (tmp_path / "figure.png").exists()


def test_text_output_has_no_control_characters(folders, loaded):
    support, query, _ = folders
    (support / "a").rename(support / "\x1b[31mred")
    (query / "0.png").rename(query / "\x9b0\u202e.png")
    text = format_answer(classify.classify_folders(loaded, support, query))
    assert text.isascii()
    assert all(line.isprintable() for line in text.split("\n"))
    assert r"\x1b[31mred" in text
    assert r"\x9b0\u202e.png" in text


# ---- Many images: tables, rows, sets, unreadable files, unknown classes. ----


def run_classify(loaded, support, query, **options):
    return classify.classify_folders(loaded, support, query, options=ClassifyOptions(**options))


def read_table(path) -> list[dict]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    table = pq.read_table(path) if path.suffix == ".parquet" else pa.csv.read_csv(path)
    return table.to_pylist()


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".jsonl"])
@pytest.mark.parametrize("mode", ["transductive", "inductive"])
def test_a_table_holds_the_rows_of_the_answer(folders, loaded, tmp_path, suffix, mode, monkeypatch):
    support, query, _ = folders
    monkeypatch.setattr(classify, "FILES_PER_BATCH", 2)
    rows = run_classify(loaded, support, query, mode=mode)["queries"]
    answer = run_classify(loaded, support, query, mode=mode, table=tmp_path / f"t{suffix}")
    assert "queries" not in answer
    assert answer["images"] == 3
    assert sum(answer["predicted"].values()) == 3
    table = read_table(tmp_path / f"t{suffix}")
    assert [row["query"] for row in table] == ["0.png", "1.png", "2.png"]
    for row, expected in zip(table, rows, strict=True):
        assert row["class"] == expected["class"]
        found = row["probabilities"] if suffix == ".jsonl" else {k: row[f"probability: {k}"] for k in "ab"}
        assert found == pytest.approx(expected["probabilities"])


def test_top_k_and_threshold(folders, loaded, tmp_path):
    support, query, _ = folders
    plain = run_classify(loaded, support, query)["queries"]
    for row, expected in zip(run_classify(loaded, support, query, top_k=9)["queries"], plain, strict=True):
        ranked = sorted(expected["probabilities"].items(), key=lambda item: -item[1])
        assert list(row) == ["query", "class", "probability", "class 2", "probability 2"]
        assert [(row["class"], row["probability"]), (row["class 2"], row["probability 2"])] == ranked
    cut = sorted(max(row["probabilities"].values()) for row in plain)[1]
    answer = run_classify(loaded, support, query, threshold=cut, top_k=1, table=tmp_path / "t.csv")
    assert answer["below_threshold"] == 1
    table = read_table(tmp_path / "t.csv")
    assert [row["class"] or None for row in table].count(None) == 1
    assert all((not row["class"]) == (row["probability"] < cut) for row in table)


def test_recursion_and_files_that_cannot_be_read(folders, loaded):
    support, query, _ = folders
    (query / "more").mkdir()
    Image.open(query / "0.png").save(query / "more" / "0.tif")
    (query / "broken.png").write_bytes(b"not an image")
    answer = run_classify(loaded, support, query, recursive=True)
    assert [row["query"] for row in answer["queries"]] == ["0.png", "1.png", "2.png", "more/0.tif"]
    (left_out,) = answer["left_out"]
    assert left_out["file"] == f"{query}/broken.png"
    assert "broken image" in left_out["reason"]
    for file in query.glob("?.png"):
        file.unlink()
    with pytest.raises(DataError, match="none of its 1 images can be read"):
        run_classify(loaded, support, query)


def test_one_image_file_is_classified_like_a_folder_that_holds_only_it(folders, loaded):
    support, query, _ = folders
    answer = run_classify(loaded, support, query / "1.png")
    for other in ("0.png", "2.png"):
        (query / other).unlink()
    assert answer == run_classify(loaded, support, query)
    assert [row["query"] for row in answer["queries"]] == ["1.png"]
    (query / "list.csv").write_text("1.png")
    with pytest.raises(DataError, match=r"list.csv: not a folder, zip file or tar file; check the path"):
        run_classify(loaded, support, query / "list.csv")


def test_too_many_queries_for_one_set_are_classified_in_random_sets(folders, loaded, monkeypatch):
    support, query, _ = folders
    for i in range(3, 10):
        Image.open(query / f"{i % 3}.png").rotate(i).save(query / f"{i}.png")
    monkeypatch.setattr(classify, "LARGEST_SET", 4)
    sizes = []
    predict = classify.predict_queries
    monkeypatch.setattr(classify, "predict_queries", lambda *a, **k: sizes.append(len(a[4])) or predict(*a, **k))
    answer = run_classify(loaded, support, query)
    assert answer["sets"] == 3
    assert sorted(sizes) == [3, 3, 4]
    assert [row["query"] for row in answer["queries"]] == [f"{i}.png" for i in range(10)]
    alone = run_classify(loaded, support, query, mode="inductive")
    assert "sets" not in alone
    (query / "5.png").unlink()
    fewer = run_classify(loaded, support, query, mode="inductive")
    by_file = {row["query"]: row["probabilities"] for row in alone["queries"]}
    assert all(row["probabilities"] == by_file[row["query"]] for row in fewer["queries"])


@pytest.mark.parametrize(("recorded", "negative"), [(False, False), (True, True), (None, True)])
def test_the_figure_shows_images_as_their_files_do(folders, loaded, tmp_path, monkeypatch, recorded, negative):
    """Inverted ones are inverted again; a model without a record may have been trained on either."""
    from metagmvae.evaluation.figures import plots

    support, query, images = folders
    preprocessing = None if recorded is None else Preprocessing.of_shape((1, 28, 28), invert=recorded)
    shown, draw = [], plots.predictions
    monkeypatch.setattr(plots, "predictions", lambda *a, **b: shown.append(draw(*a, **b)) or shown[0])
    run_classify(replace(loaded, preprocessing=preprocessing), support, query, figure=tmp_path / "f.png")
    pixels = shown[0].axes[0].images[0].get_array()
    expected = 1 - images[0, None] / 255 if negative and recorded is None else images[0, None] / 255
    np.testing.assert_allclose(pixels, expected[0], atol=1e-12)
    assert replace(loaded, preprocessing=preprocessing).negative is negative


def test_the_figure_says_how_many_images_it_leaves_out(folders, loaded, tmp_path, monkeypatch):
    from metagmvae.evaluation.figures import plots

    support, query, _ = folders
    for i in range(3, 30):
        Image.open(query / f"{i % 3}.png").rotate(i).save(query / f"{i}.png")
    notes = []
    draw = plots.predictions
    monkeypatch.setattr(plots, "predictions", lambda *a, **b: notes.append((len(a[2]), a[4])) or draw(*a, **b))
    answer = run_classify(loaded, support, query, figure=tmp_path / "f.png")
    shown = sum(min(count, answer_figure.SHOWN) for count in answer["predicted"].values())
    assert notes == [(shown, f"{shown} of 30 images")]
    assert (tmp_path / "f.png").is_file()


def test_unknown_classes_need_a_level_and_are_an_answer_of_their_own(folders, loaded, tmp_path):
    support, query, _ = folders
    with pytest.raises(DataError, match="fit it first: metagmvae calibrate"):
        run_classify(loaded, support, query, unknown=True)

    def with_level(background: float):
        fit = FittedBackground(
            mode="inductive",
            way=5,
            shot=1,
            temperature=1.0,
            background=background,
            open_classes=5,
            accuracy=0.9,
            **QUALITY,
        )
        record = fits(1.0, adapt=loaded.settings.adapt, temperatures=(), backgrounds=(fit,))
        return replace(loaded, calibration=record)

    options = {"unknown": True, "mode": "inductive"}
    plain = probabilities(run_classify(loaded, support, query, mode="inductive"))
    low, high = (run_classify(with_level(level), support, query, **options) for level in (-1e4, 1e4))
    np.testing.assert_allclose(probabilities(low), np.c_[plain, np.zeros(3)], atol=1e-6)
    assert high["predicted"] == {"a": 0, "b": 0, "unknown": 3}
    table = tmp_path / "t.parquet"
    run_classify(with_level(1e4), support, query, table=table, figure=tmp_path / "f.png", **options)
    assert [row["probability: unknown"] for row in read_table(table)] == pytest.approx([1, 1, 1])
    (support / "a").rename(support / "unknown")
    with pytest.raises(DataError, match="class folder 'unknown' has the name of the answer"):
        run_classify(with_level(0.0), support, query, **options)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--table", "t.xlsx"], "--table t.xlsx: the name must end in .csv, .parquet or .jsonl"),
        (["--top-k", "0"], "--top-k 0: must be at least 1"),
        (["--threshold", "2"], "--threshold 2: is a probability"),
        (["--threshold", "nan"], "--threshold nan: is a probability"),
    ],
)
def test_wrong_options_are_one_line_and_write_nothing(folders, loaded, tmp_path, words, message, capsys, monkeypatch):
    support, query, _ = folders
    package = save_package(tmp_path / "package", loaded)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["classify", str(package), "--support", str(support), "--query", str(query), *words]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_table_that_fails_leaves_no_file(folders, loaded, tmp_path, monkeypatch):
    support, query, _ = folders
    monkeypatch.setattr(classify, "predict_queries", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_classify(loaded, support, query, table=tmp_path / "t.parquet")
    assert not list(tmp_path.glob("*.parquet"))
    assert not list(tmp_path.glob(".t.parquet*"))
