import pytest

from ensemble.sampling.prompts import PromptError, Prompts, find_class


@pytest.mark.parametrize(("label", "class_id"), [("boot", 0), ("shirt", 1), ("1", 1)])
def test_class_is_found_by_name_and_number(label, class_id):
    assert find_class(label, ("boot", "shirt")) == class_id


@pytest.mark.parametrize(
    ("label", "names", "message"),
    [
        ("Boots", ("boot", "shirt"), "'Boots' is not a class; did you mean 'boot'.*known: 0 boot, 1 shirt"),
        ("2", ("boot", "shirt"), "'2' is not a class; known"),
        ("boot", (), "trained without labels; leave it out"),
    ],
)
def test_unknown_class_names_the_known_ones(label, names, message):
    with pytest.raises(PromptError, match=message):
        find_class(label, names)


def test_rows_of_prompts_stay_together():
    prompts = Prompts((0, 1, -1), ("a", "", "c"))
    assert prompts.rows(slice(1, 3)) == Prompts((1, -1), ("", "c"))
    assert len(Prompts.of_classes([2, 2])) == 2
