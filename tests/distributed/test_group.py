"""Groups of processes: what they add up is what one process has of everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import together
from torch import Tensor, nn

from omniquant_pl.distributed import Group, Mesh, add_moments, join_ranges, join_samples
from omniquant_pl.distributed.gradients import add_gradients
from omniquant_pl.errors import ConfigurationError
from omniquant_pl.quant import ChannelRange, InputMoment, InputSample

VALUES = torch.randn(5, 7, 3, generator=torch.Generator().manual_seed(0))  # [samples, tokens, channels]


def connect(segments: int | None = 1) -> Mesh:
    dist.init_process_group("gloo")
    return Mesh.connected(segments)


def statistics(rank: int) -> dict[str, Any]:
    group = connect().data
    own = group.share(VALUES)
    sample, moment = InputSample(3, 10, share=(group.rank, group.size)), InputMoment(3)
    for part in own.split(2):
        sample.add(part)
    moment.add(own)
    columns = {"a": 3, "b": 2, "c": 1}
    ranges = {"a": ChannelRange.of(own)}
    if rank == 1:
        ranges["b"] = ChannelRange(torch.zeros(2), torch.ones(2))
    joined = join_ranges(ranges, columns, torch.device("cpu"), group)
    moments = add_moments({"a": moment}, {"a": 3, "b": 2}, torch.device("cpu"), group)
    return {
        "ranges": {name: (found.low.tolist(), found.high.tolist()) for name, found in joined.items()},
        "moments": {name: (found.second.tolist(), found.tokens) for name, found in moments.items()},
        "sample": join_samples({"a": sample}, group)["a"].tolist(),
        "total": group.total([1.0, float(rank)]),
    }


def test_statistics_are_those_of_one_process() -> None:
    whole = InputSample(3, 10)
    whole.add(VALUES)
    rows = VALUES.reshape(-1, 3)
    found = together(statistics, 2)
    assert found[0] == found[1]
    low, high = rows.amin(0).tolist(), rows.amax(0).tolist()
    assert found[0]["ranges"] == {"a": (low, high), "b": ([0.0, 0.0], [1.0, 1.0])}
    second, tokens = found[0]["moments"]["a"]
    torch.testing.assert_close(torch.tensor(second), rows.T @ rows)
    assert tokens == len(rows)
    assert "b" not in found[0]["moments"]
    assert found[0]["sample"] == whole.rows.tolist()
    assert found[0]["total"] == [2.0, 1.0]


def gradients(rank: int) -> list[Any]:
    """One process has seen two samples of a step, the other one, which has reached another parameter too."""
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    own: list[Tensor | None] = [torch.tensor([1.0, 2.0]) * (rank + 1), None, None]
    if rank == 1:
        own[1] = torch.tensor([4.0, 6.0])
    loss, totals = add_gradients(torch.tensor(0.5 + rank), own, parameters, connect().data)
    return [loss.item(), *(None if total is None else total.tolist() for total in totals)]


def test_gradients_are_sums_and_stay_away_where_no_process_has_one() -> None:
    assert together(gradients, 2) == [[2.0, [3.0, 6.0], [4.0, 6.0], None]] * 2


def large_and_shared(rank: int) -> list[Any]:
    """Two parameters have been given one gradient, which is too large to travel with others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("omniquant_pl.distributed.gradients._LARGE", 4)
        parameters = [nn.Parameter(torch.zeros(2, 2)) for _ in range(2)]
        shared = torch.ones(1, 1).expand(2, 2) * (rank + 1)
        _, totals = add_gradients(torch.zeros(()), [shared, shared], parameters, connect().data)
        return [total.tolist() for total in totals if total is not None]


def test_large_gradients_are_added_up_once_each() -> None:
    assert together(large_and_shared, 2) == [[[[3.0, 3.0], [3.0, 3.0]]] * 2] * 2


def refusal(rank: int) -> str:
    group = connect().world
    try:
        with group.together():
            if rank == 1:
                raise ConfigurationError("data.samples", "too few")
    except ConfigurationError as error:
        return f"{type(error).__name__} {error}"
    return "nothing"


def test_what_one_refuses_all_refuse() -> None:
    expected = ["RemoteRankError data.samples: too few", "ConfigurationError data.samples: too few"]
    assert together(refusal, 2) == expected


def places(rank: int) -> tuple[int, ...]:
    mesh = connect(2)
    gathered = mesh.segments.gather(torch.tensor([rank]), to=1)
    ranks = -1 if gathered is None else sum(int(value) * 10**place for place, value in enumerate(gathered))
    return mesh.data.rank, mesh.data.size, mesh.segments.rank, mesh.segments.size, ranks


def test_a_mesh_has_segments_and_shares() -> None:
    assert together(places, 4) == [(0, 2, 0, 2, -1), (1, 2, 0, 2, -1), (0, 2, 1, 2, 20), (1, 2, 1, 2, 31)]


def three(rank: int) -> None:
    connect(2)


def test_segments_that_cannot_be_shared_out_are_refused() -> None:
    assert all("trainer.strategy.segments: 2 segments" in str(error) for error in together(three, 3))


def test_one_process_is_its_own_result() -> None:
    group, values = Group(), torch.tensor([3.0])
    tensors: list[Tensor] = [group.sum(values), group.minimum(values), group.concatenate(values[:, None])[0]]
    assert [float(tensor) for tensor in tensors] == [3.0] * 3
    assert group.share(VALUES) is not None
    assert torch.equal(group.share(VALUES), VALUES)
    assert group.collect("x") == ["x"]
    assert not group.any(False)
