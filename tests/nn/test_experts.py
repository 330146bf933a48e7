"""Experts as linears of their own, against transformers' 3-D weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
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


def one_by_one(experts: UnfusedExperts, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
    """Looks for each expert's tokens on its own."""
    result = torch.zeros_like(hidden)
    for index in range(EXPERTS):
        tokens, place = torch.where(chosen == index)
        result = result.index_add(
            0, tokens, experts[index](hidden[tokens], experts.act_fn) * shares[tokens, place, None]
        )
    return result


def test_tokens_of_an_expert_keep_their_order(unfused: UnfusedExperts) -> None:
    """Every sum has its terms in the order that a look at one expert after the other gives: bit for bit."""
    hidden, chosen, shares = routing([0, 1, 3], 2)
    found = []
    for run in (unfused, partial(one_by_one, unfused)):
        inputs = hidden.clone().requires_grad_(), shares.clone().requires_grad_()
        output = run(inputs[0], chosen, inputs[1])
        reached = [unfused[index].get_submodule(name).weight for index in (0, 1, 3) for name in ("w1", "w2", "w3")]
        found.append([output, *torch.autograd.grad(output.square().sum(), [*inputs, *reached])])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


class ValuesThatDecide(TorchDispatchMode):
    """Records the operations of which the host waits for values, not only for shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.index.Tensor:  # the numbers of rows have the result's shape, a mask has not
            waits = any(index is not None and index.dtype is torch.bool for index in args[1])
        else:
            waits = bool({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags))
        self.names += [str(func)] if waits else []
        return func(*args, **(kwargs or {}))


def test_the_experts_are_waited_for_once(unfused: UnfusedExperts, monkeypatch: pytest.MonkeyPatch) -> None:
    lists: list[Tensor] = []
    to_list = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda values: lists.append(values) or to_list(values))
    hidden, chosen, shares = routing([0, 1, 3], 2)
    with ValuesThatDecide() as waited:
        unfused(hidden, chosen, shares)
    assert waited.names == []
    counts = [int((chosen == index).sum()) for index in range(EXPERTS)]
    assert [to_list(values) for values in lists] == [counts]


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
