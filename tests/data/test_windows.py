"""Windows against expectations written by hand with Python's own ``random``."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from omniquant_pl.data.windows import (
    CutSpec,
    chunk,
    first_windows,
    sample_documents,
    sample_stream,
)
from omniquant_pl.errors import ConfigurationError


def spec(**changes: object) -> CutSpec:
    values: dict[str, object] = {
        "name": "corpus",
        "role": "calibration",
        "samples": 5,
        "length": 4,
        "seed": 2,
    }
    return CutSpec(**(values | changes))  # type: ignore[arg-type]


def lengths(text: str) -> Tensor:
    """A tokenizer for tests: "3:10" is the ten tokens 300, 301, ..."""
    start, count = text.split(":")
    return torch.arange(int(count)) + 100 * int(start)


class TestSampleStream:
    def test_draws_of_the_original(self) -> None:
        tokens = torch.arange(1000, 1100)
        random.seed(7)
        expected = []
        for _ in range(6):
            i = random.randint(0, 100 - 8 - 1)
            expected.append(list(range(1000 + i, 1000 + i + 8)))
        found = sample_stream(tokens, spec(samples=6, length=8, seed=7))
        assert found.tolist() == expected
        assert found.dtype == torch.int64

    def test_global_random_is_left_alone(self) -> None:
        random.seed(1)
        state = random.getstate()
        sample_stream(torch.arange(100), spec())
        assert random.getstate() == state

    def test_one_position(self) -> None:
        # randint(0, 0): the original never takes the last possible window
        assert sample_stream(torch.arange(5), spec()).tolist() == [[0, 1, 2, 3]] * 5

    @pytest.mark.parametrize("count", [0, 3, 4])
    def test_too_short(self, count: int) -> None:
        with pytest.raises(ConfigurationError) as caught:
            sample_stream(torch.arange(count), spec())
        message = str(caught.value)
        assert caught.value.key == "data.dataset"
        for part in (
            "'corpus'",
            f"{count} tokens",
            "data.samples=5",
            "data.sequence_length=4",
        ):
            assert part in message


class TestSampleDocuments:
    def test_draws_of_the_original(self) -> None:
        documents = ["0:3", "1:9", "2:4", "3:12", "4:2"]
        draws = random.Random(11)
        expected = []
        for _ in range(7):
            while True:
                i = draws.randint(0, 4)
                tokens = lengths(documents[i]).tolist()
                if len(tokens) > 4:
                    break
            j = draws.randint(0, len(tokens) - 4 - 1)
            expected.append(tokens[j : j + 4])
        found = sample_documents(lengths, documents, spec(samples=7, seed=11))
        assert found.tolist() == expected

    def test_one_long_document_among_many_is_found(self) -> None:
        documents = ["0:1"] * 99 + ["7:5"]
        found = sample_documents(lengths, documents, spec(samples=2))
        assert found.tolist() == [[700, 701, 702, 703]] * 2

    def test_none_is_long_enough(self) -> None:
        with pytest.raises(ConfigurationError, match=r"data\.dataset: .*'corpus' has 4 tokens"):
            sample_documents(lengths, ["0:4", "1:2"], spec())

    def test_no_documents(self) -> None:
        with pytest.raises(ConfigurationError, match="has 0 tokens"):
            sample_documents(lengths, [], spec())


class TestChunk:
    @given(count=st.integers(3, 60), length=st.integers(2, 20))
    def test_is_the_stream_without_its_tail(self, count: int, length: int) -> None:
        if count < length:
            return
        found = chunk(torch.arange(count), spec(length=length))
        assert found.shape == (count // length, length)
        assert found.flatten().tolist() == list(range(count - count % length))

    def test_exactly_one_window(self) -> None:
        assert chunk(torch.arange(4), spec()).tolist() == [[0, 1, 2, 3]]

    def test_too_short(self) -> None:
        with pytest.raises(ConfigurationError) as caught:
            chunk(torch.arange(3), spec(role="evaluation"))
        assert caught.value.key == "data.evaluation"
        assert "3 tokens" in str(caught.value)
        assert "data.sequence_length=4" in str(caught.value)
        assert "data.samples" not in str(caught.value)


class TestFirstWindows:
    def test_in_order(self) -> None:
        windows = torch.arange(12).view(6, 2)
        assert first_windows(windows, spec()).tolist() == windows[:5].tolist()

    def test_too_few(self) -> None:
        with pytest.raises(ConfigurationError, match=r"^data\.samples: 5 .*'corpus' has 3 rows"):
            first_windows(torch.zeros(3, 4, dtype=torch.int64), spec())
