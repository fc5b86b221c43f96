"""Figures of the pages: a training with a single point is visible too."""

import base64
import re

from metagmvae.evaluation.comparison.page_figures import COLOURS, draw_curves
from metagmvae.evaluation.comparison.validation_rows import ComparedItem


def markers(svg: str) -> int:
    """Points that are drawn in the colour of the first curve."""
    return len(re.findall(rf"<use [^>]*fill: {COLOURS[0]}; stroke", svg, re.IGNORECASE))


def vertical_lines(svg: str) -> list[tuple[str, str]]:
    """Paths of one vertical line in this colour: the ends of each."""
    path = rf'<path d="M (\S+) (\S+) \nL \1 (\S+) \n" [^>]*stroke: {COLOURS[0]}'
    return [(top, bottom) for _, top, bottom in re.findall(path, svg, re.IGNORECASE)]


def test_a_single_point_is_drawn_with_its_interval():
    line = {"stage": "meta", "global_step": 4, "elapsed_s": 2.0, "loss": 3.0}
    line |= {"validation/5w1s": 0.5, "validation/5w1s_ci95": 0.1}
    images = draw_curves([ComparedItem("run", "run", (), [line])])
    assert [image.caption for image in images] == [
        "Validation accuracy, (5,1), by training step",
        "Validation accuracy, (5,1), by training time, seconds",
        "Meta-training loss by training step",
    ]
    accuracy, _, loss = (base64.b64decode(image.light.partition(",")[2]).decode() for image in images)
    assert (markers(accuracy), markers(loss)) == (1, 1)
    ((top, bottom),) = vertical_lines(accuracy)
    assert abs(float(top) - float(bottom)) > 50
    assert vertical_lines(loss) == []
