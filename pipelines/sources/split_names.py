"""Names of folders and files that stand for the splits."""

from __future__ import annotations

import re

SPLITS = ("train", "validation", "test")
NAMES = {
    "train": ("train", "training", "trainset", "metatrain"),
    "validation": ("validation", "val", "valid", "dev", "development", "validate", "valset", "metaval"),
    "test": ("test", "testing", "eval", "evaluation", "testset", "metatest"),
}
HINTS = {"pred": "test", "predict": "test", "prediction": "test", "predictions": "test", "holdout": "test"}
"""Further words that mention a split, but do not name one."""
SPLIT_OF_NAME = {name: split for split, names in NAMES.items() for name in names}
WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])")


def split_of(name: str) -> str | None:
    """The split that a name stands for; case, spaces, `-` and `_` are ignored: `Train`, `meta-test`, `test_set`."""
    return SPLIT_OF_NAME.get(re.sub(r"[\s_-]", "", name).casefold())


def split_hint(name: str) -> tuple[str, str] | None:
    """A split that a name mentions, and its other words: `seg_train` -> ("train", "seg").

    None if it mentions none or several.
    """
    words = [word.casefold() for word in WORDS.findall(name)]
    meaning = SPLIT_OF_NAME | HINTS
    mentioned = [word for word in words if word in meaning]
    if len(mentioned) != 1:
        return None
    return meaning[mentioned[0]], " ".join(word for word in words if word != mentioned[0])
