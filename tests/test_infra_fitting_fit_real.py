"""`metagmvae fit` on the plain archives of Omniglot and Mini-ImageNet, with a short budget."""

import json

import pytest

from metagmvae.infra.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.real_data, pytest.mark.timeout(3600)]


@pytest.mark.parametrize(
    ("archive", "preset", "found", "least", "worst_ece"),
    [
        ("omniglot/images_evaluation.zip", "strokes-cpu", "13,180 images, grey, 659 class folders", 0.8, 0.1),
        ("mini-imagenet/test.zip", "photos-cpu", "12,000 images, with colour, 20 class folders", 0.22, 0.5),
    ],
)
def test_the_transcript_of_a_plain_folder(data_root, tmp_path, capsys, archive, preset, found, least, worst_ece):
    out = tmp_path / "model"
    code = main(["fit", str(data_root / archive), "--budget", "3m", "--out", str(out), "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    answer, lines = json.loads(captured.out), captured.err.splitlines()
    assert lines[0].startswith(found)
    commands = [line.split()[2] for line in lines if line.startswith("$ metagmvae")]
    assert commands == ["prepare", "train", "evaluate", "evaluate", "classify"]
    assert answer["preset"] == preset
    for row in answer["accuracy"]:
        assert row["on"] == "test classes"
        assert row["accuracy"] - row["ci95"] > least
        assert row["ece"] < worst_ece
    plan, schedule = (json.loads((out / "fit.json").read_text())[key] for key in ("plan", "schedule"))
    planned = schedule["used_s"] + schedule["reserved_s"] + schedule["pretrain_steps"] * schedule["pretrain_step_s"]
    assert planned <= plan["budget_s"] or not schedule["fits"]
    right, queries = (int(word) for word in answer["example"].split() if word.isdigit())
    # The files are dark drawings or photographs as they came: without the recorded preprocessing this is chance, 20%.
    assert right / queries > (0.7 if preset == "strokes-cpu" else 0.2)
    assert (out / "report.html").stat().st_size > 10_000
