"""Experts against what they are one by one."""

import torch
from timm.layers import Mlp
from torch import nn

from locat_lightning.nn.experts import Experts, without_experts


def experts_of_scales(number):
    """Experts that multiply by 1, 2, …: their outputs tell which one a token has met."""
    experts = Experts(nn.Linear(5, 5), number)
    for scale, expert in enumerate(experts.experts, start=1):
        expert.weight.data, expert.bias.data = scale * torch.eye(5), torch.zeros(5)
    return experts


def test_each_token_meets_one_expert_and_each_expert_as_many_tokens():
    torch.manual_seed(0)
    experts, x = experts_of_scales(3), torch.rand(2, 10, 5, requires_grad=True)
    met = []
    for _ in range(200):
        scales = experts(x) / x
        torch.testing.assert_close(scales, scales[..., :1].round().expand_as(scales))
        met.append(scales[..., 0].round().flatten())
        assert sorted((met[-1] == n).sum().item() for n in (1, 2, 3)) == [6, 7, 7]
    shares = torch.stack([(torch.stack(met) == n).float().mean(0) for n in (1, 2, 3)])
    assert (shares - 1 / 3).abs().max() < 0.15  # every token meets every expert
    experts(x).sum().backward()
    assert set(x.grad.round().flatten().tolist()) == {1.0, 2.0, 3.0}


def test_fewer_tokens_than_experts():
    experts, x = experts_of_scales(4), torch.rand(1, 2, 5)
    assert experts(x).shape == x.shape


def test_in_evaluation_one_network_has_the_mean_weights():
    torch.manual_seed(0)
    experts, mean = Experts(Mlp(6, 12), 3), Mlp(6, 12)
    for parameter in experts.parameters():
        nn.init.normal_(parameter)
    for name, parameter in mean.named_parameters():
        parameter.data = sum(expert.get_parameter(name) for expert in experts.experts).detach() / 3
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(experts.eval()(x), mean(x))


def test_weights_without_experts_have_the_names_of_a_model_without():
    one, two, other = torch.rand(3, 2, 2)
    weights = {
        "blocks.1.mlp.experts.0.fc1.weight": one,
        "blocks.1.mlp.experts.1.fc1.weight": two,
        "blocks.0.mlp.fc1.weight": other,
        "experts.0.weight": one,  # no feed-forward network's
        "experts.1.weight": two,
    }
    found = without_experts(weights)
    assert list(found) == [
        "blocks.1.mlp.fc1.weight",
        "blocks.0.mlp.fc1.weight",
        "experts.0.weight",
        "experts.1.weight",
    ]
    torch.testing.assert_close(found["blocks.1.mlp.fc1.weight"], (one + two) / 2)
    assert all(torch.equal(found[name], weights[name]) for name in list(found)[1:])
