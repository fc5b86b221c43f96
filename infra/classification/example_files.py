"""Files of one episode, copied from a folder of pictures, to classify as a user would."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from metagmvae.pipelines.archives.reader import read_entry
from metagmvae.pipelines.rng import keyed_rng
from metagmvae.pipelines.sources.folder_layout import FolderImage

WAYS, QUERIES = 5, 4


def write_example(root: str, out: Path, images: Iterable[FolderImage], seed: int) -> dict[str, str]:
    """Copy one labelled file and up to four queries of up to five classes; return the class of each query file.

    The queries of a class are of other groups, such as patients, than all labelled files, if it has images of others;
    else than its own, if it can.

    Args:
        root: folder or archive of the images.
        out: folder to write `labelled/CLASS/FILE` and `queries/FILE` into; what it holds is replaced.
        images: that may be used; those without a class are not.
        seed: of the choice.
    """
    by_class: dict[str, list[FolderImage]] = {}
    for image in images:
        if image.class_name:
            by_class.setdefault(image.class_name, []).append(image)
    rng = keyed_rng("example", seed)
    possible = sorted(name for name, members in by_class.items() if len(members) > 1)
    chosen = [possible[row] for row in rng.permutation(len(possible))[:WAYS]]
    shutil.rmtree(out, ignore_errors=True)
    (out / "queries").mkdir(parents=True)
    class_of_file = {}
    drawn = [[by_class[name][row] for row in rng.permutation(len(by_class[name]))] for name in chosen]
    closed = {labelled.group for labelled, *_ in drawn} - {""}
    for k, (name, (labelled, *others)) in enumerate(zip(chosen, drawn, strict=True)):
        folder = name.replace("/", " - ")
        (out / "labelled" / folder).mkdir(parents=True)
        own, none = {labelled.group} - {""}, set[str]()
        possible_queries = ([image for image in others if image.group not in groups] for groups in (closed, own, none))
        queries = next(filter(None, possible_queries))[:QUERIES]
        for number, image in enumerate([labelled, *queries]):
            file = image.file.name
            suffix = PurePosixPath(file).suffix
            if number == 0:
                target = out / "labelled" / folder / f"0{suffix}"
            else:
                target = out / "queries" / f"{k}-{number}{suffix}"
                class_of_file[target.name] = folder
            target.write_bytes(read_entry(root, file))
    return class_of_file
