"""Streams, batches and their order."""

from __future__ import annotations

import torch

from omniquant_pl.activations import BatchOrder, StreamBatches, Streams, map_batches


def test_batches_cover_every_sample_once_with_a_shorter_last_one() -> None:
    inputs, targets = torch.arange(5.0).view(5, 1, 1), -torch.arange(5.0).view(5, 1, 1)
    batches = list(StreamBatches((inputs, targets), 2, BatchOrder(5, 0, shuffle=True)))
    assert [len(batch[0]) for batch in batches] == [2, 2, 1]
    assert len(StreamBatches((inputs, targets), 2, BatchOrder(5, 0, shuffle=True))) == 3
    seen = torch.cat([batch[0].flatten() for batch in batches])
    assert sorted(seen.tolist()) == [0, 1, 2, 3, 4]
    assert all(torch.equal(batch[0], -batch[1]) for batch in batches)


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first, second, other = BatchOrder(50, 3, True), BatchOrder(50, 3, True), BatchOrder(50, 4, True)
    orders = []
    for epoch in range(3):
        first.set_epoch(epoch)
        orders.append(first())
    second.set_epoch(2)
    assert torch.equal(second(), orders[2])
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(other(), orders[0])
    assert torch.equal(BatchOrder(4, 0, shuffle=False)(), torch.arange(4))


def test_a_batch_of_one_is_a_view() -> None:
    values = torch.randn(3, 2, 2)
    (batch,) = next(iter(StreamBatches((values,), 1, BatchOrder(3, 0, False))))
    assert batch.data_ptr() == values.data_ptr()


def test_streams_are_equal_until_they_advance() -> None:
    streams = Streams(torch.zeros(1))
    assert streams.are_equal
    streams.advance(torch.zeros(1), torch.zeros(1))
    assert not streams.are_equal


def test_map_batches_joins_what_the_function_returns_in_order() -> None:
    values = torch.randn(10, 4096, 1)
    sizes: list[int] = []
    result = map_batches(lambda batch: sizes.append(len(batch)) or batch * 2, values)  # type: ignore[func-returns-value]
    assert torch.equal(result, values * 2)
    assert sizes == [2] * 5
