"""HiddenStatePair, where they are kept, batches and their order."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from omniquant_pl.hidden_states import (
    BatchOrder,
    HiddenStateBatches,
    HiddenStatePair,
    HiddenStates,
    MemoryBudget,
    PersistedHiddenStates,
    Storage,
    StorageTier,
    map_hidden_states,
    storage_tier_for,
)
from omniquant_pl.spec import BudgetSpec

CPU = torch.device("cpu")


def stream_of(values: Tensor) -> HiddenStates:
    return HiddenStates(values, CPU)


def storage_in(folder: Path, place: StorageTier = "disk", dtype: torch.dtype = torch.float32) -> Storage:
    return Storage(place, dtype, CPU, folder)


def stored(storage: Storage, values: Tensor) -> HiddenStates:
    stream = storage.empty(values.shape)
    stream.write(slice(None), values)
    return stream


class TestBatches:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("place", ["device", "disk"])  # the second is read by another thread
    def test_cover_every_sample_once_with_a_shorter_last_one(
        self, tmp_path: Path, place: StorageTier, dtype: torch.dtype
    ) -> None:
        inputs = torch.arange(5.0).view(5, 1, 1)
        storage = storage_in(tmp_path, place, dtype)
        streams = stored(storage, inputs), stored(storage, -inputs)
        batches = list(HiddenStateBatches(streams, 2, BatchOrder(5, 0, shuffle=True)))
        assert [len(batch[0]) for batch in batches] == [2, 2, 1]
        assert len(HiddenStateBatches(streams, 2, BatchOrder(5, 0, shuffle=True))) == 3
        seen = torch.cat([batch[0].flatten() for batch in batches])
        assert sorted(seen.tolist()) == [0, 1, 2, 3, 4]
        assert all(torch.equal(batch[0], -batch[1]) for batch in batches)
        assert all(part.dtype == torch.float32 for batch in batches for part in batch)

    def test_go_on_in_the_middle_of_an_epoch(self) -> None:
        values = stream_of(torch.randn(7, 2, 2))
        whole, half = (HiddenStateBatches((values,), 2, BatchOrder(7, 3, shuffle=True)) for _ in range(2))
        iterator = iter(half)
        next(iterator)
        next(iterator)
        again = HiddenStateBatches((values,), 2, BatchOrder(7, 3, shuffle=True))
        again.load_state_dict(half.state_dict())
        expected = list(whole)
        assert all(torch.equal(one[0], other[0]) for one, other in zip(again, expected[2:], strict=True))
        assert len(list(again)) == len(expected)  # only the first epoch is cut

    def test_one_sample_is_a_view(self) -> None:
        values = torch.randn(3, 2, 2)
        (batch,) = next(iter(HiddenStateBatches((stream_of(values),), 1, BatchOrder(3, 0, False))))
        assert batch.data_ptr() == values.data_ptr()

    def test_a_file_is_read_when_a_batch_is(self, tmp_path: Path) -> None:
        stream = stored(storage_in(tmp_path), torch.ones(1, 2, 2))
        batch = stream.read(slice(0, 1))
        stream.write(slice(0, 1), torch.zeros(1, 2, 2))
        assert torch.equal(batch, torch.ones(1, 2, 2))


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


def test_streams_are_equal_until_they_advance() -> None:
    streams = HiddenStatePair(stream_of(torch.zeros(1, 1, 1)))
    assert streams.are_equal
    streams.advance(stream_of(torch.zeros(1, 1, 1)), stream_of(torch.zeros(1, 1, 1)))
    assert not streams.are_equal


def test_a_device_gets_as_many_samples_as_fill_it(tmp_path: Path) -> None:
    values = torch.randn(10, 1024, 1)
    sizes: list[int] = []
    result = map_hidden_states(lambda batch: sizes.append(len(batch)) or batch * 2, values, storage_in(tmp_path))  # type: ignore[func-returns-value]
    assert torch.equal(torch.cat(list(result.parts())), values * 2)
    assert sizes == [2] * 5


def test_files_that_are_not_kept_have_no_name(tmp_path: Path) -> None:
    """Whatever ends the process, they go with it."""
    values = torch.randn(4, 8, 2)
    storage = MemoryBudget(CPU, tmp_path, BudgetSpec(device=0, host=0)).storage(10**9)
    stream = stored(storage, values)
    assert storage.place == "disk"
    assert not list(tmp_path.iterdir())
    assert torch.equal(stream.read(slice(None)), values)


@pytest.mark.parametrize("place", ["device", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_map_stream_is_the_function_wherever_streams_are(
    tmp_path: Path, place: StorageTier, dtype: torch.dtype
) -> None:
    values = torch.randn(10, 4096, 2)
    storage = storage_in(tmp_path, place, dtype)
    result = map_hidden_states(lambda batch: batch * 3, stored(storage, values), storage)
    expected = (values.to(dtype).float() * 3).to(dtype)
    assert torch.equal(torch.cat(list(result.parts())), expected.float())


def test_an_error_in_the_function_arrives(tmp_path: Path) -> None:
    storage = storage_in(tmp_path)
    values = stored(storage, torch.zeros(10, 4096, 1))

    def fail(batch: Tensor) -> Tensor:
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        map_hidden_states(fail, values, storage)


class TestPlace:
    @pytest.mark.parametrize(("host", "place"), [(1e-6, "disk"), (1.0, "device"), (None, "device")])
    def test_without_a_gpu(self, host: float | None, place: str) -> None:
        assert storage_tier_for(2000, BudgetSpec(device=0, host=host), CPU) == place

    @pytest.mark.parametrize(
        ("device", "host", "place"), [(3e-6, 0, "device"), (1e-6, 3e-6, "host"), (1e-6, 1e-6, "disk"), (0, 1, "host")]
    )
    def test_with_one(self, device: float, host: float, place: str) -> None:
        assert storage_tier_for(2000, BudgetSpec(device=device, host=host), torch.device("cuda")) == place

    def test_what_torch_keeps_for_later_is_free(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """40 % of 1000 free bytes are not enough; of those and 1500 of its own that torch does not use, they are."""
        kept = {"mem_get_info": (1000, 9000), "memory_reserved": 2500, "memory_allocated": 1000}
        for name, value in kept.items():
            monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
        places = [storage_tier_for(size, BudgetSpec(host=1.0), torch.device("cuda")) for size in (1000, 1001)]
        assert places == ["device", "host"]

    def test_a_room_counts_bytes(self, tmp_path: Path) -> None:
        room = MemoryBudget(CPU, tmp_path, BudgetSpec(host=1e-6))
        assert [room.storage(250).place, room.storage(251).place] == ["device", "disk"]
        assert room.storage(500, torch.bfloat16).place == "device"

    def test_files_go_with_their_streams(self, tmp_path: Path) -> None:
        storage = storage_in(tmp_path)
        stream = stored(storage, torch.ones(2, 3, 4))
        assert [path.stat().st_size for path in tmp_path.iterdir()] == [2 * 3 * 4 * 4]
        del stream
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("place", ["device", "disk"])
    def test_files_of_another_process_stay(self, tmp_path: Path, place: StorageTier) -> None:
        """A plan is made beside a run that is at work."""
        stream = stored(storage_in(tmp_path), torch.ones(1, 2, 3))
        assert stored(storage_in(tmp_path, place), torch.zeros(1, 2, 3)).shape == stream.shape
        stream.keep_as(tmp_path / "kept.bin")
        assert (tmp_path / "kept.bin").stat().st_size == 2 * 3 * 4


class TestKept:
    MARK = {"settings": "a", "model": "b", "data": "c"}  # noqa: RUF012

    def keep(self, folder: Path, position: int = 3) -> tuple[Tensor, Tensor]:
        storage = storage_in(folder)
        values = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        streams = HiddenStatePair(*(stored(storage, value) for value in values))
        PersistedHiddenStates(storage, self.MARK).keep(position, streams)
        return values

    def restored(self, folder: Path, last: int = 9, **changes: str) -> tuple[int, HiddenStatePair] | None:
        return PersistedHiddenStates(storage_in(folder), {**self.MARK, **changes}).restore(last)

    def test_come_back(self, tmp_path: Path) -> None:
        values = self.keep(tmp_path)
        found = self.restored(tmp_path)
        assert found is not None
        assert found[0] == 3
        assert torch.equal(found[1].full_precision.values, values[0])
        assert torch.equal(found[1].quantized.values, values[1])

    def test_replace_those_before_them(self, tmp_path: Path) -> None:
        self.keep(tmp_path, 3)
        self.keep(tmp_path, 4)
        found = self.restored(tmp_path)
        assert found is not None
        assert found[0] == 4
        assert len(list(tmp_path.glob("*.bin"))) == 2

    def test_do_not_count_behind_the_last_finished_block_or_for_another_calibration(self, tmp_path: Path) -> None:
        self.keep(tmp_path)
        assert self.restored(tmp_path, last=2) is None
        assert self.restored(tmp_path, data="other") is None
        assert PersistedHiddenStates(storage_in(tmp_path, dtype=torch.bfloat16), self.MARK).restore(9) is None
        assert self.restored(tmp_path / "nothing") is None

    @pytest.mark.parametrize("bit", [0, 100, 95 * 8 + 7])
    @pytest.mark.parametrize("name", ["00003.full_precision.bin", "00003.quantized.bin", "streams.json"])
    def test_a_flipped_bit_is_noticed(self, tmp_path: Path, name: str, bit: int) -> None:
        self.keep(tmp_path)
        content = bytearray((tmp_path / name).read_bytes())
        content[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(content)
        assert self.restored(tmp_path) is None

    def test_a_truncated_file_is_noticed(self, tmp_path: Path) -> None:
        self.keep(tmp_path)
        path = tmp_path / "00003.quantized.bin"
        path.write_bytes(path.read_bytes()[:-4])
        assert self.restored(tmp_path) is None

    def test_are_removed_at_the_end(self, tmp_path: Path) -> None:
        self.keep(tmp_path)
        PersistedHiddenStates(storage_in(tmp_path), self.MARK).remove()
        assert list(tmp_path.iterdir()) == []

    def test_are_not_written_where_streams_are_in_memory(self, tmp_path: Path) -> None:
        storage = storage_in(tmp_path, "device")
        streams = HiddenStatePair(*(stored(storage, torch.ones(1, 1, 1)) for _ in range(2)))
        PersistedHiddenStates(storage, self.MARK).keep(1, streams)
        assert list(tmp_path.iterdir()) == []
