"""The README shows what the result files say."""

from pathlib import Path

from metagmvae.evaluation.comparison.readme import render_readme

ROOT = Path(__file__).parents[1]


def test_the_readme_is_rendered_from_the_result_files():
    text = (ROOT / "README.md").read_text()
    assert "<!-- table:omniglot-best-5way+,omniglot-cpu," in text
    assert render_readme(text, ROOT / "evaluation" / "results") == text


def test_a_changed_number_would_be_noticed():
    text = (ROOT / "README.md").read_text()
    changed = text.replace(" ± ", " ± 1", 1)
    assert render_readme(changed, ROOT / "evaluation" / "results") == text
