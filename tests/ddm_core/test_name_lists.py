"""A message lists few names and counts the rest."""

from ddm_core.name_lists import MAX_NAMES, join_names


def test_every_name_is_listed_or_counted():
    names = [chr(ord("a") + number) for number in range(MAX_NAMES + 2)]
    assert join_names([]) == ""
    assert join_names(names[:MAX_NAMES]) == "a, b, c, d, e"
    assert join_names(names) == "a, b, c, d, e and 2 more"
