import torch

from experts.conditions.condition import Condition


def test_null_is_the_last_embedding_row():
    condition = Condition(torch.tensor([0, -1, 9]))
    assert condition.embedding_index(10).tolist() == [0, 10, 9]
    assert Condition.null(2).embedding_index(0).tolist() == [0, 0]


def test_drop_returns_null_rows_and_keeps_the_original():
    condition = Condition(torch.tensor([3, 4, 5]))
    assert condition.drop(torch.tensor([True, False, True])).class_id.tolist() == [-1, 4, -1]
    assert condition.class_id.tolist() == [3, 4, 5]


def test_rows_and_concatenate_select_rows():
    condition = Condition(torch.tensor([3, 4, 5]))
    assert condition.rows(torch.tensor([2, 0])).class_id.tolist() == [5, 3]
    assert condition.rows(torch.tensor([True, False, True])).class_id.tolist() == [3, 5]
    joined = Condition.concatenate([condition, Condition.null(3)])
    assert joined.class_id.tolist() == [3, 4, 5, -1, -1, -1]
    assert len(joined) == 6
