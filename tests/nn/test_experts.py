"""Experts as linears of their own, against transformers' 3-D weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from omniquant_pl.nn import UnfusedExperts

HIDDEN, INTERMEDIATE, EXPERTS, TOKENS = 12, 20, 5, 30


@pytest.fixture
def fused() -> nn.Module:
    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=EXPERTS)
    config._experts_implementation = "eager"
    experts = MixtralExperts(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.5, generator=generator)
    return experts


@pytest.fixture
def unfused(fused: nn.Module) -> UnfusedExperts:
    experts = UnfusedExperts(fused, ("w1", "w3", "w2"))
    for index in range(EXPERTS):
        gate, up = fused.gate_up_proj[index].detach().chunk(2)
        for name, weight in {"w1": gate, "w3": up, "w2": fused.down_proj[index].detach()}.items():
            experts[index].get_submodule(name).weight.data = weight.clone()
    return experts


def routing(reached: list[int], top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, and for every token some of the experts that may be reached, with random shares."""
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(TOKENS, len(reached), generator=generator).argsort(1)[:, :top_k]
    shares = torch.rand(TOKENS, top_k, generator=generator)
    return torch.randn(TOKENS, HIDDEN, generator=generator), torch.tensor(reached)[order], shares


@pytest.mark.parametrize(("reached", "top_k"), [([0, 1, 2, 3, 4], 2), ([0, 3, 4], 2), ([2], 1), ([4, 1, 0, 2, 3], 5)])
class TestSameAsFused:
    def test_output(self, fused: nn.Module, unfused: UnfusedExperts, reached: list[int], top_k: int) -> None:
        inputs = routing(reached, top_k)
        torch.testing.assert_close(unfused(*inputs), fused(*inputs))

    def test_gradients(self, fused: nn.Module, unfused: UnfusedExperts, reached: list[int], top_k: int) -> None:
        """Those of experts that no token reaches are none at all; transformers' are zero."""
        hidden, chosen, shares = routing(reached, top_k)
        states = [hidden.double().requires_grad_() for _ in range(2)]
        for experts, state in zip((fused.double(), unfused.double()), states, strict=True):
            experts(state, chosen, shares.double()).square().sum().backward()
        torch.testing.assert_close(states[1].grad, states[0].grad)
        for index in range(EXPERTS):
            names = {"w1": fused.gate_up_proj.grad[index, :INTERMEDIATE], "w2": fused.down_proj.grad[index]}
            names["w3"] = fused.gate_up_proj.grad[index, INTERMEDIATE:]
            for name, expected in names.items():
                found = unfused[index].get_submodule(name).weight.grad
                if index in reached:
                    torch.testing.assert_close(found, expected)
                else:
                    assert found is None
                    assert not expected.any()


def test_names_are_those_of_checkpoints(unfused: UnfusedExperts) -> None:
    expected = {f"{index}.{name}.weight" for index in range(EXPERTS) for name in ("w1", "w2", "w3")}
    assert set(unfused.state_dict()) == expected


def test_it_is_made_without_storage(fused: nn.Module) -> None:
    unfused = UnfusedExperts(fused.to("meta"), ("w1", "w3", "w2"))
    assert all(parameter.is_meta for parameter in unfused.parameters())


def test_half_precision_comes_back_in_the_inputs_dtype(unfused: UnfusedExperts) -> None:
    hidden, chosen, shares = routing([0, 1, 3], 2)
    with torch.autocast("cpu", torch.bfloat16):
        half = unfused(hidden, chosen, shares)
    assert half.dtype == torch.float32
    exact = unfused(hidden, chosen, shares)
    assert 0 < float((half - exact).norm() / exact.norm()) < 2e-2
