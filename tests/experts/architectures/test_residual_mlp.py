import torch

from experts.architectures.residual_mlp import ResidualMLP

SHAPE = (2, 3)


def test_input_skip_scales_each_number_of_the_latent():
    model = ResidualMLP(SHAPE, width=8, depth=1, input_skip=True)
    noised, t, null = torch.randn(5, *SHAPE), torch.rand(5), torch.zeros(5, dtype=torch.int64)
    assert not model(noised, t, null).any(), "it begins at zero"
    factors = torch.arange(6.0)
    model.skip.bias.data.copy_(factors)
    assert torch.equal(model(noised, t, null), noised * factors.view(SHAPE))


def test_the_input_skip_adds_parameters_only_where_asked_for():
    assert not [name for name, _ in ResidualMLP(SHAPE, width=8, depth=1).named_parameters() if "skip" in name]
