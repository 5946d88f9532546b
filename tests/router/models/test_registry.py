import pytest
import torch

from router.config import RouterConfig
from router.models.registry import build_router

KINDS = ("mlp", "transformer")


def random_router(kind: str, shape: tuple[int, ...] = (1, 5, 5)) -> torch.nn.Module:
    """Build a network with a random head."""
    torch.manual_seed(0)
    model = build_router(RouterConfig(kind=kind, width=16, depth=2, heads=2, tokens=4), shape, 3, 2)
    torch.nn.init.normal_(model.head.weight)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
def test_untrained_router_is_uniform(kind: str) -> None:
    model = build_router(RouterConfig(kind=kind, width=16), (6,), 3, 0)
    logits = model(torch.randn(4, 6), torch.rand(4), torch.zeros(4, dtype=torch.int64))
    assert logits.tolist() == [[0, 0, 0]] * 4


@pytest.mark.parametrize("kind", KINDS)
def test_logits_depend_on_noised_t_and_class(kind: str) -> None:
    model = random_router(kind)
    noised, t, null = torch.randn(1, 1, 5, 5), torch.tensor([0.5]), torch.tensor([2])
    logits = model(noised, t, null)
    for changed in (model(noised + 1, t, null), model(noised, t + 0.01, null), model(noised, t, null - 1)):
        assert (changed - logits).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_every_latent_reaches_the_logits(kind: str) -> None:
    """25 latents do not divide into 4 tokens; none is lost to the padding."""
    noised = torch.randn(1, 1, 5, 5, requires_grad=True)
    logits = random_router(kind)(noised, torch.tensor([0.5]), torch.tensor([0]))
    (slope,) = torch.autograd.grad(logits[0, 0], noised)
    assert (slope != 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_independent(kind: str) -> None:
    model, noised, t = random_router(kind), torch.randn(4, 1, 5, 5), torch.rand(4)
    classes = torch.tensor([0, 1, 2, 0])
    torch.testing.assert_close(model(noised[2:3], t[2:3], classes[2:3]), model(noised, t, classes)[2:3])


def test_width_must_divide_into_heads() -> None:
    with pytest.raises(ValueError, match="multiple of heads"):
        build_router(RouterConfig(kind="transformer", width=10, heads=4), (6,), 3, 0)
