"""What enters a linear, beyond its range: the second moment of all tokens, and a random sample of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from omniquant_pl.quant.observers import observe

__all__ = ["InputMoment", "InputSample", "observe_moments", "observe_samples"]


class InputMoment:
    """The sum of ``x x^T`` over all tokens seen: half the Hessian of a linear's squared output error (GPTQ).

    Both attributes are plain sums, so those of several processes or of parts of the calibration set add up.

    Args:
        columns: Input channels.
        device: Where the sum is kept.

    Attributes:
        second: ``[in, in]`` float32.
        tokens: Number of tokens.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.second = torch.zeros(columns, columns, device=device)
        self.tokens = 0

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Add the tokens of ``[..., in]``; computed in float32 whatever their dtype, under autocast too."""
        rows = values.reshape(-1, values.shape[-1]).float()
        self.second.addmm_(rows.T, rows)  # autocast leaves in-place operations alone
        self.tokens += len(rows)


class InputSample:
    """A uniform random sample, without replacement, of the tokens seen so far.

    Every token draws a number and the largest numbers stay. Samples of one size and seed that see batches of the same
    shapes choose the same tokens.

    Args:
        columns: Input channels.
        size: Tokens to keep.
        seed: Of the choice.
        device: Where the tokens are kept.
        share: Which of how many shares of the sequences is seen here: ``(0, 2)`` for every other one from the first on.
            The tokens draw what they would draw if all sequences were seen, so that of the samples of all shares the
            largest numbers are the sample of the whole.

    Attributes:
        rows: The tokens ``[at most size, in]``, float32, in the order they came.
        drawn: Their numbers, float64.
        places: Their positions among all tokens.
    """

    def __init__(
        self,
        columns: int,
        size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
        share: tuple[int, int] = (0, 1),
    ) -> None:
        if size < 1:
            raise ValueError(f"a sample of {size} tokens is empty")
        self.rows = torch.empty(0, columns, device=device)
        self.size = size
        self.drawn = torch.empty(0, dtype=torch.float64)
        self.places = torch.empty(0, dtype=torch.long)
        self._share, self._shares = share
        self._seen = 0
        self._generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def add(self, values: Tensor) -> None:
        """Let the tokens of ``[..., in]`` take part; the last but one dimension is that of a sequence."""
        rows, before = values.reshape(-1, values.shape[-1]), len(self.rows)
        drawn, places = self._draw(len(rows), values.shape[-2] if values.ndim > 1 else 1)
        candidates = torch.cat((self.drawn, drawn))
        kept = candidates.topk(min(self.size, len(candidates))).indices.sort().values
        stayed, joined = kept[kept < before], kept[kept >= before] - before
        self.drawn = candidates[kept]
        self.places = torch.cat((self.places, places))[kept]
        self.rows = torch.cat((self.rows[stayed], rows[joined].float()))

    def _draw(self, count: int, length: int) -> tuple[Tensor, Tensor]:
        """Numbers and positions of so many tokens of this share, in sequences of that length."""
        everything = count * self._shares
        drawn = torch.rand(everything, generator=self._generator, dtype=torch.float64)
        places = torch.arange(self._seen, self._seen + everything)
        self._seen += everything
        own = [tensor.view(-1, self._shares, length)[:, self._share].flatten() for tensor in (drawn, places)]
        return own[0], own[1]


@contextmanager
def observe_moments(
    module: nn.Module, names: Iterable[str], transform: Callable[[Tensor], Tensor] | None = None
) -> Iterator[dict[str, InputMoment]]:
    """Record the second moments of submodules' inputs for as long as the context lasts.

    A moment takes ``in * in`` floats, and a matrix product per batch: of submodules that read the same tensor (query,
    key and value; gate and up) name only one.

    Args:
        module: The module that holds them.
        names: Dotted names of submodules whose first argument is ``[..., in]``.
        transform: What a submodule does with its input before the product, token by token. A linear that quantizes
            its input multiplies the quantized values, so theirs is the moment that counts.

    Yields:
        A dictionary that fills while the module runs, by name. A submodule that no token reaches, as may happen to an
        expert in a mixture, is absent.
    """
    moments: dict[str, InputMoment] = {}

    def record(name: str, values: Tensor) -> None:
        if name not in moments:
            moments[name] = InputMoment(values.shape[-1], values.device)
        moments[name].add(values if transform is None else transform(values))

    with observe(module, names, record):
        yield moments


@contextmanager
def observe_samples(
    module: nn.Module, names: Iterable[str], size: int = 1024, seed: int = 0, share: tuple[int, int] = (0, 1)
) -> Iterator[dict[str, InputSample]]:
    """Sample tokens that enter submodules for as long as the context lasts.

    Args:
        module: The module that holds them.
        names: Dotted names of submodules whose first argument is ``[..., in]``.
        size: Tokens to keep of each.
        seed: Of the choice.
        share: Of the sequences, as of :class:`InputSample`.

    Yields:
        A dictionary that fills while the module runs, by name; a submodule that no token reaches is absent.
    """
    samples: dict[str, InputSample] = {}

    def record(name: str, values: Tensor) -> None:
        if name not in samples:
            samples[name] = InputSample(values.shape[-1], size, seed, values.device, share)
        samples[name].add(values)

    with observe(module, names, record):
        yield samples
