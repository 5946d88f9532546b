import pytest
import torch

from experts.conditions.condition import Condition
from experts.conditions.text_embedding import TextEmbedding
from experts.config import DiTConfig, ResidualMLPConfig
from experts.networks.class_settings import NetworkError
from experts.networks.model_io import save_model
from experts.networks.registry import build_network, call_network, load_network


def make_text(batch, tokens=5, width=8, pooled=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TextEmbedding(
        torch.randn(batch, tokens, width, generator=generator),
        torch.arange(tokens) < torch.randint(1, tokens + 1, (batch, 1), generator=generator),
        torch.randn(batch, pooled, generator=generator),
        torch.zeros(batch, dtype=torch.bool),
    )


def make_network(null_text):
    torch.manual_seed(0)
    network = build_network(ResidualMLPConfig(width=16, depth=1), (4,), 3, null_text)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def test_drop_clears_the_dropped_rows_only():
    text = make_text(3)
    dropped = text.drop(torch.tensor([False, True, False]))
    assert dropped.is_null.tolist() == [False, True, False]
    assert not dropped.sequence[1].any()
    assert not dropped.mask[1].any()
    assert torch.equal(dropped.rows(torch.tensor([0, 2])).sequence, text.sequence[[0, 2]])


def test_concatenate_gives_rows_without_text_the_null_text():
    text = make_text(2)
    joined = Condition.concatenate([Condition(torch.tensor([0, 1]), text), Condition.null(1)])
    assert joined.text.is_null.tolist() == [False, False, True]
    assert joined.is_null.tolist() == [False, False, True]
    assert torch.equal(joined.rows(slice(0, 2)).text.pooled, text.pooled)


def test_fill_null_replaces_null_rows_by_the_networks_null_text():
    text, null_text = make_text(3), make_text(1, seed=1)
    filled = text.drop(torch.tensor([True, False, False])).fill_null(null_text)
    assert torch.equal(filled.pooled[0], null_text.pooled[0])
    assert torch.equal(filled.mask[0], null_text.mask[0])
    assert torch.equal(filled.sequence[1:], text.sequence[1:])


def test_a_missing_text_is_the_null_text_of_the_network():
    null_text = make_text(1, seed=1)
    network = make_network(null_text)
    noised, t, class_id = torch.randn(2, 4), torch.tensor([0.3, 0.6]), torch.tensor([0, 1])
    repeated = TextEmbedding.concatenate([null_text, null_text])
    given = Condition(class_id, TextEmbedding(repeated.sequence, repeated.mask, repeated.pooled, torch.zeros(2) > 0))
    without = call_network(network, noised, t, Condition(class_id))
    assert torch.equal(without, call_network(network, noised, t, given))
    assert not torch.equal(without, call_network(network, noised, t, Condition(class_id, make_text(2))))


def test_the_null_text_is_saved_with_the_network(tmp_path):
    network = make_network(make_text(1, seed=1))
    save_model(network, tmp_path)
    noised, t = torch.randn(2, 4), torch.tensor([0.3, 0.6])
    loaded = load_network(tmp_path)
    assert torch.equal(
        call_network(loaded, noised, t, Condition.null(2)), call_network(network, noised, t, Condition.null(2))
    )
    assert "null_text_sequence" not in loaded.state_dict()


def test_a_text_of_another_length_is_refused():
    network = make_network(make_text(1, seed=1))
    with pytest.raises(ValueError, match=r"takes texts of .*\(5, 8, 6\), not \(7, 8, 6\)"):
        call_network(network, torch.randn(2, 4), torch.ones(2), Condition(torch.tensor([0, 1]), make_text(2, tokens=7)))


def test_a_network_without_text_refuses_one():
    network = make_network(None)
    with pytest.raises(ValueError, match="without text"):
        call_network(network, torch.randn(2, 4), torch.ones(2), Condition(torch.tensor([0, 1]), make_text(2)))


def test_a_network_of_classes_cannot_be_built_for_text():
    with pytest.raises(NetworkError, match="dit reads classes and no text"):
        build_network(DiTConfig(), (4, 8, 8), 3, make_text(1))
