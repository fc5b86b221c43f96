"""The tables of the Markdown pages agree with the recorded results."""

import json
from pathlib import Path

import pytest

from metagmvae.evaluation.comparison.record_tables import BENCHES
from metagmvae.evaluation.paper_tables import readme
from metagmvae.evaluation.paper_tables.readme import PAGES, fit_table, render_tables, write_pages
from metagmvae.infra.cli import main
from metagmvae.pipelines.records import DataError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "evaluation" / "results"


@pytest.mark.parametrize("name", PAGES)
def test_page_shows_the_recorded_results(name):
    page = (ROOT / name).read_text()
    assert "<!-- /" in page, "no table markers"
    assert render_tables(page, RESULTS) == page, "run `make docs`"


def test_text_about_the_generative_head_agrees_with_the_recorded_difference():
    def to_transport(task: str) -> dict:
        record = json.loads((RESULTS / f"omniglot-best-seed0-{task}.json").read_text())
        return next(pair for pair in record["paired"] if pair["baseline"] == "optimal transport")

    pair = to_transport("20way-5shot")
    assert pair["verdict"] == "worse"
    assert {to_transport(task)["verdict"] for task in ("5way-1shot", "5way-5shot", "20way-1shot")} == {"undecided"}
    words = f"it is {-100 * pair['difference']:.2f} ± {100 * pair['ci95']:.2f} points below it"
    for name in PAGES[:2]:
        page = " ".join((ROOT / name).read_text().split())
        assert "The generative head does not improve on optimal transport on the same features" in page
    assert words in " ".join((ROOT / "README.md").read_text().split())


def test_changed_number_is_restored():
    page = render_tables("<!-- table:omniglot-best-5way+ -->\n<!-- /table -->", RESULTS)
    assert render_tables(page.replace(" ± ", " ± 1", 1), RESULTS) == page


@pytest.mark.parametrize(
    ("marker", "row"),
    [
        ("calibration:omniglot-best-5way-calibrated", "| (20,5) | transductive | 99.13 ± 0.07 | 1.15 | 0.10 | 0.71 |"),
        (
            "queries:omniglot-best-5way",
            "| model, class weights estimated (transductive) | 99.51 ± 0.14 | 99.44 ± 0.16 |",
        ),
        (
            "open:omniglot-best-5way",
            "| (5,1) | Meta-GMVAE (transductive) | 99.13 ± 0.22 | 98.14 | 94.16 ± 0.33 | 1.31 |",
        ),
        ("summary:omniglot", "| optimal transport (transductive) | 99.88 ± 0.08 |"),
        ("summary:mini-imagenet", "| **`mini-imagenet-cpu`** (transductive) | 45.19 ± 0.80 |"),
        (
            "table:omniglot-best-5way-vinyals-inductive",
            "`** (inductive, Vinyals split) |  |  | 91.61",
        ),
        (
            "ablation:omniglot-5way",
            "| `train.beta = 1.0` | 65.35 ± 1.04 | \N{MINUS SIGN}26.96 ± 1.02 | 36.24 ± 0.40 |",
        ),
        (
            "paired:omniglot-best-5way-tuned-baselines",
            "| soft k-means (transductive) | +0.00 ± 0.02 | temperature 5, scaled |",
        ),
        (
            "paper-table:1,budget=120,data=omniglot,ways=5",
            "|  | `omniglot-cactus-acai-maml` | 69.42 ± 1.22 | 89.66 ± 2.11 | inductive, own split, 308 episodes;",
        ),
        ("ablation:joint-training", "| features of the pre-trained encoder, frozen; 200 steps | 99.21"),
        ("bench:step", "| R=1 | 0.38 | 28.7 | 1,016 | 90% |"),
        ("bench:features", "| rows written per second | 54,297 |"),
        ("curve:omniglot-5way", "| 27,000 | 2,971 | 96.97 ± 0.79 | 98.08 ± 0.35 |"),
        ("promotion:omniglot-sweep", "| (20,1) | 98.54 | 98.47 | +0.07 ± 0.04 | better |"),
        (
            "sweep:omniglot",
            "| `train.learning_rate` | 88.1% (33.2% to 99.9%) | 74.9% | 0.001 to 0.0032 | 97.00 ± 0.86",
        ),
    ],
)
def test_each_kind_of_marker_renders_its_file(marker, row):
    page = f"before\n<!-- {marker} -->\nold\n<!-- /{marker.split(':')[0]} -->\nafter"
    rendered = render_tables(page, RESULTS)
    assert row in rendered
    assert "\nold\n" not in rendered
    assert render_tables(rendered, RESULTS) == rendered


def test_every_benchmark_table_renders_with_rows_of_equal_length():
    for name in BENCHES:
        lines = render_tables(f"<!-- bench:{name} --><!-- /bench -->", RESULTS).splitlines()[1:-1]
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) > 2


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("<!-- bench:step -->", "has no <!-- /KIND -->"),
        ("<!-- bench:step -->\n<!-- bench:loader -->\n<!-- /bench -->", "has no <!-- /KIND -->"),
        ("<!-- summary:nothing -->\n<!-- /summary -->", "use one of omniglot, mini-imagenet"),
        ("<!-- bench:nothing -->\n<!-- /bench -->", "use one of step, episodes"),
        ("<!-- table:nothing -->\n<!-- /table -->", "no result of 'nothing'"),
        ("<!-- table:omniglot-cpu,mini-imagenet-cpu -->\n<!-- /table -->", "results of one dataset"),
        ("<!-- paper-table:7 -->\n<!-- /paper-table -->", "table 7: the tables of the paper with results are 1, 2, 10"),
        ("<!-- paper-table:one -->\n<!-- /paper-table -->", "paper-table:one: no such table; give 1, 2, 10 or flips"),
        ("<!-- paper-table:1,budget=2m -->\n<!-- /paper-table -->", "budget: .*options are budget=SECONDS"),
        ("<!-- paper-table:1,time=120 -->\n<!-- /paper-table -->", "time: .*options are budget=SECONDS"),
        ("<!-- paper-table:1,ways=7 -->\n<!-- /paper-table -->", "--ways 7: the table has no such column"),
        ("<!-- paper-table:1,budget=121 -->\n<!-- /paper-table -->", "no row has a result; record one"),
        ("<!-- paper-table:1,data=glyphs -->\n<!-- /paper-table -->", "no row has a result; record one"),
        ("<!-- ablation:nothing -->\n<!-- /ablation -->", "no such file"),
    ],
)
def test_wrong_markers_are_errors(page, message):
    with pytest.raises(DataError, match=message):
        render_tables(page, RESULTS)


def test_pages_are_written_in_place_and_only_in_a_source_checkout(tmp_path, monkeypatch, capsys):
    module = tmp_path / "evaluation" / "paper_tables" / "readme.py"
    monkeypatch.setattr(readme, "__file__", str(module))
    assert main(["table", "--write"]) == 2
    assert "not a source checkout; run `make docs`" in capsys.readouterr().err
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "results").symlink_to(RESULTS)
    (tmp_path / "README.md").write_text("<!-- bench:step -->\n<!-- /bench -->")
    monkeypatch.setattr(readme, "PAGES", ("README.md", "missing/README.md"))
    assert main(["table", "--write"]) == 0
    assert capsys.readouterr().out == "changed: README.md\n"
    assert "| R=1 | 0.38 |" in (tmp_path / "README.md").read_text()
    assert write_pages() == []
    (tmp_path / "README.md").write_text("<!-- bench:step -->")
    with pytest.raises(DataError, match=r"README.md: a marker"):
        write_pages()


def fit_record(**changes):
    row = {"way": 5, "shot": 1, "accuracy": 0.9962, "ci95": 0.0013, "ece": 0.0014}
    mean = {"way": 5, "shot": 1, "accuracy": 0.9789, "ci95": 0.003, "baseline": "nearest class mean"}
    return {
        "samples": {"train": 19460, "validation": 6500, "test": 6500},
        "classes": {"train": 973, "validation": 325, "test": 325},
        "preset": "strokes-cpu",
        "steps": {"pretrain": 635, "meta": 100},
        "accuracy": [row],
        "baselines": [mean | {"baseline": "soft k-means", "accuracy": 0.9963}, mean],
        "budget_s": 900.0,
        "seconds": {"train": 375.9, "all": 932.4},
    } | changes


def test_the_table_of_fit(tmp_path):
    (tmp_path / "fit-letters.json").write_text(json.dumps(fit_record()))
    head, _, row = fit_table(tmp_path, "letters").splitlines()
    assert head.count("|") == row.count("|")
    assert row.startswith("| letters | 19,460 (973), 325 | `strokes-cpu`, 635 + 100 | 16 (15) |")
    assert row.endswith("| 99.62 ± 0.13 | 97.89 ± 0.30 | 0.001 |  |  |  |")
    with pytest.raises(DataError, match=r"fit-photos\.json"):
        fit_table(tmp_path, "letters,photos")
    (tmp_path / "fit-wrong.json").write_text(json.dumps(fit_record(preset=7)))
    with pytest.raises(DataError, match=r"fit-wrong\.json: preset = 7: .*record it again"):
        fit_table(tmp_path, "wrong")
