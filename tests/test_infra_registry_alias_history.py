"""Which promotion a rollback takes back, from the records of moves alone."""

from metagmvae.infra.registry.alias_history import AliasChange, promotion_change


def moves(*told):
    """Records of (action, version, former, undoes), numbered from 1."""
    keys = ("action", "version", "former", "undoes")
    same = {"alias": "champion", "time": "2026-01-01T00:00:00+00:00", "by": "me@here"}
    return [
        AliasChange(number=number, **same, **dict(zip(keys, move, strict=True)))
        for number, move in enumerate(told, start=1)
    ]


PROMOTED_TWICE = [("registered", "1", None, None), ("promoted", "2", "1", None), ("promoted", "3", "2", None)]
BACK = ("rolled back", "2", "3", 3)


def test_each_rollback_takes_back_one_promotion():
    assert promotion_change(moves(*PROMOTED_TWICE), "champion", "3").number == 3
    assert promotion_change(moves(*PROMOTED_TWICE, BACK), "champion", "2").number == 2
    assert promotion_change(moves(*PROMOTED_TWICE, BACK, ("rolled back", "1", "2", 2)), "champion", "1") is None
    assert promotion_change(moves(*PROMOTED_TWICE), "other", "3") is None
    assert promotion_change([], "champion", "3") is None


def test_a_rollback_that_died_before_its_move_can_be_asked_for_again():
    """Its record is there, and the alias is where it was."""
    died = moves(*PROMOTED_TWICE, BACK)
    assert promotion_change(died, "champion", "3").number == 3
    assert promotion_change(moves(*PROMOTED_TWICE, BACK, BACK), "champion", "2").number == 2
    later = moves(*PROMOTED_TWICE, BACK, ("promoted", "4", "3", None))
    assert promotion_change(later, "champion", "4").former == "3"
    assert promotion_change(moves(*PROMOTED_TWICE, BACK, BACK), "champion", "3").number == 3


def test_a_version_that_was_taken_back_and_promoted_again():
    again = moves(*PROMOTED_TWICE, BACK, ("promoted", "3", "2", None))
    assert promotion_change(again, "champion", "3").number == 5
