"""Which promotion a rollback undoes, according to the history."""

from metagmvae.infra.registry.alias_history import AliasChange, promotion_change


def history(*rows):
    """Return records of (action, version, former, undoes), numbered from 1."""
    keys = ("action", "version", "former", "undoes")
    shared = {"alias": "champion", "time": "2026-01-01T00:00:00+00:00", "by": "me@here"}
    return [
        AliasChange(number=number, **shared, **dict(zip(keys, row, strict=True)))
        for number, row in enumerate(rows, start=1)
    ]


PROMOTED_TWICE = [("registered", "1", None, None), ("promoted", "2", "1", None), ("promoted", "3", "2", None)]
BACK = ("rolled back", "2", "3", 3)


def test_each_rollback_undoes_one_promotion():
    assert promotion_change(history(*PROMOTED_TWICE), "champion", "3").number == 3
    assert promotion_change(history(*PROMOTED_TWICE, BACK), "champion", "2").number == 2
    assert promotion_change(history(*PROMOTED_TWICE, BACK, ("rolled back", "1", "2", 2)), "champion", "1") is None
    assert promotion_change(history(*PROMOTED_TWICE), "other", "3") is None
    assert promotion_change([], "champion", "3") is None


def test_rollback_without_its_move_can_be_repeated():
    """Earlier releases wrote the record first; a process that died then left the alias where it was."""
    died = history(*PROMOTED_TWICE, BACK)
    assert promotion_change(died, "champion", "3").number == 3
    assert promotion_change(history(*PROMOTED_TWICE, BACK, BACK), "champion", "2").number == 2
    later = history(*PROMOTED_TWICE, BACK, ("promoted", "4", "3", None))
    assert promotion_change(later, "champion", "4").former == "3"
    assert promotion_change(history(*PROMOTED_TWICE, BACK, BACK), "champion", "3").number == 3


def test_version_that_was_rolled_back_and_promoted_again():
    again = history(*PROMOTED_TWICE, BACK, ("promoted", "3", "2", None))
    assert promotion_change(again, "champion", "3").number == 5
