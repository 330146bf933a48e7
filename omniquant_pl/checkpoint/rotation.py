"""Fixed rotations that are folded into the weights before anything is quantized or learned.

An orthogonal matrix ``R`` turns the residual stream, in which a few channels are large, into one whose channels are
alike. Whatever reads the stream through an RMSNorm computes the same, once the norm's weight is moved into its readers:
``rms(x R) = rms(x)``. With the stream's tensors as rows, the embedding becomes ``E R``, readers ``W diag(w) R`` behind
norms whose factor is one, and writers ``R^T W`` with the bias ``R^T b``. Values of a head, ``R``-turned likewise, are
turned back in the columns of the output projection. Nothing is left to do at inference (QuaRot, arXiv 2404.00456,
section 4; SpinQuant, arXiv 2405.16406, R1 and R2).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import cast

import torch
from torch import Tensor

from omniquant_pl.errors import ConfigurationError
from omniquant_pl.families import BlockLayout, Family
from omniquant_pl.spec import RotationSpec
from omniquant_pl.transform import AttentionShape, BlockTensors, NormToLinears, ValueToOutput
from omniquant_pl.transform.heads import linear_and_rows

__all__ = ["RandomHadamard", "Rotation"]

_Block = tuple[BlockLayout, Mapping[str, tuple[int, ...]]]


_ROWS = 1024
"""Rows that are turned at a time: a float64 copy of a whole embedding would be large."""
_LARGEST_FACTOR = 64
"""Size of a Kronecker factor of powers of two."""


class RandomHadamard:
    """An orthogonal matrix: random signs, then a Hadamard matrix over the root of its size.

    It is kept as small factors of a Kronecker product. Sizes are powers of two times an order that one of Paley's
    constructions gives, which all usual widths are; for others the odd part of the size gets a random orthogonal
    matrix instead.

    Args:
        size: Rows and columns.
        seed: Of the signs.
    """

    def __init__(self, size: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.size = size
        self._signs = torch.randint(0, 2, (size,), generator=generator, dtype=torch.float64) * 2 - 1
        core = _core(size, generator)
        self._factors = [core, *_powers_of_two(size // len(core))]

    def __call__(self, states: Tensor, scale: Tensor | None = None) -> Tensor:
        """Multiply rows with the matrix: ``states diag(scale) R``.

        Args:
            states: ``[..., n * size]``; every ``size`` consecutive channels are turned by themselves.
            scale: Factors of the channels ``[size]``; ``None`` for ones.

        Returns:
            float32 of the same shape, computed in float64.
        """
        signs = self._signs if scale is None else self._signs * scale
        parts = states.reshape(-1, self.size).split(_ROWS)
        return torch.cat([self._turn(part * signs).to(torch.float32) for part in parts]).view(states.shape)

    def _turn(self, rows: Tensor) -> Tensor:
        """Take the factors one after the other; each moves its part of the channels' index from front to back."""
        for factor in self._factors:
            parts = rows.view(len(rows), len(factor), -1)
            rows = (parts.transpose(1, 2) @ factor).reshape(len(rows), -1)
        return rows


class Rotation:
    """Maps a model's tensors to those of the rotated model.

    Args:
        spec: What is rotated.
        family: The model's family.
        blocks: Layout of every block, and shapes of its tensors by name.
        heads: The heads of the blocks.
        width: Channels of the residual stream.

    Raises:
        ConfigurationError: If the family does not say how its models can be rotated, or not of everything.
    """

    def __init__(
        self, spec: RotationSpec, family: Family, blocks: Iterable[_Block], heads: AttentionShape, width: int
    ) -> None:
        if spec.residual and family.head is None:
            raise ConfigurationError(
                "model.rotation",
                "the residual stream of this family cannot be rotated: that takes RMSNorms as all that reads it and "
                "linears as all that writes it; model.rotation.residual: false leaves it and rotates the values",
            )
        for layout, shapes in blocks:
            _check_block(spec, layout, shapes)
        self._heads = heads
        self._head = family.head if spec.residual else None
        self._residual = RandomHadamard(width, spec.seed)
        self._value = RandomHadamard(heads.head_dim, spec.seed) if spec.values else None

    @property
    def turns_residual(self) -> bool:
        """Whether the residual stream is rotated, and with it what surrounds the blocks."""
        return self._head is not None

    def block(self, layout: BlockLayout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a block's tensors, float32, by their names inside the block."""
        result = dict(tensors)
        if self.turns_residual:
            for norm in _norms(layout):
                self._turn_readers(norm, result)
            for name in layout.writers:
                self._turn_writer(name, result)
        if self._value is not None:
            for pair in _values(layout):
                self._turn_values(self._value, pair, result)
        return result

    def non_block_tensors(self, embedding: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what surrounds the blocks: embedding, final norm and head are changed.

        Args:
            embedding: Name of the embedding's weight.
            tensors: Tensors by their names in the model, the head's weight among them even if it is the embedding's.
        """
        result = dict(tensors)
        if self._head is not None:
            result[embedding] = self._residual(result[embedding])
            self._turn_readers(self._head, result)
        return result

    def _turn_readers(self, norm: NormToLinears, tensors: BlockTensors) -> None:
        weight = tensors[f"{norm.norm}.weight"]
        for name in (*norm.linears, *norm.others):
            tensors[f"{name}.weight"] = self._residual(tensors[f"{name}.weight"], weight + norm.offset)
        tensors[f"{norm.norm}.weight"] = torch.full_like(weight, 1 - norm.offset)

    def _turn_writer(self, name: str, tensors: BlockTensors) -> None:
        tensors[f"{name}.weight"] = self._residual(tensors[f"{name}.weight"].T).T.contiguous()
        if f"{name}.bias" in tensors:
            tensors[f"{name}.bias"] = self._residual(tensors[f"{name}.bias"])

    def _turn_values(self, turn: RandomHadamard, pair: ValueToOutput, tensors: BlockTensors) -> None:
        linear, rows = linear_and_rows(pair.value, self._heads, tensors)
        chosen = slice(None) if rows is None else rows
        for name in (f"{linear}.weight", f"{linear}.bias"):
            if name in tensors:
                tensor = tensors[name].clone()
                tensor[chosen] = turn(tensor[chosen].movedim(0, -1)).movedim(-1, 0)
                tensors[name] = tensor
        tensors[f"{pair.output}.weight"] = turn(tensors[f"{pair.output}.weight"])


def _check_block(spec: RotationSpec, layout: BlockLayout, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a block of which the layout does not tell all that a rotation has to know."""
    if spec.values and not _values(layout):
        raise ConfigurationError("model.rotation", "not every block has values that an output projection reads")
    if not spec.residual:
        return
    norms = list(_norms(layout))
    known = {name for norm in norms for name in (*norm.linears, *norm.others)} | set(layout.writers)
    matrices = {name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1}
    unknown = [*sorted(known ^ matrices), *(norm.norm for norm in norms if f"{norm.norm}.bias" in shapes)]
    if unknown:
        message = f"{unknown[0]} is neither a linear that reads or writes the residual stream nor an RMSNorm"
        raise ConfigurationError("model.rotation", message)


def _norms(layout: BlockLayout) -> Iterator[NormToLinears]:
    return (pair for pair in layout.pairs if isinstance(pair, NormToLinears))


def _values(layout: BlockLayout) -> list[ValueToOutput]:
    return [pair for pair in layout.pairs if isinstance(pair, ValueToOutput)]


def _powers_of_two(size: int) -> Iterator[Tensor]:
    """Yield Sylvester's Hadamard matrices over the roots of their sizes, whose product of sizes is a power of two."""
    while size > 1:
        matrix = torch.ones(1, 1, dtype=torch.float64)
        while len(matrix) < min(size, _LARGEST_FACTOR):
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        yield matrix / math.sqrt(len(matrix))
        size //= len(matrix)


def _core(size: int, generator: torch.Generator) -> Tensor:
    """Return an orthogonal matrix for the odd part of a size: the smallest Hadamard matrix that has it as a factor."""
    odd = size // (size & -size)
    if odd == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    order = 4 * odd
    while size % order == 0:
        matrix = _paley(order)
        if matrix is not None:
            return matrix.div(math.sqrt(order))
        order *= 2
    orthogonal, _ = torch.linalg.qr(torch.randn(odd, odd, generator=generator, dtype=torch.float64))
    return cast(Tensor, orthogonal)


def _paley(order: int) -> Tensor | None:
    """Return the Hadamard matrix of an order that Paley's first or second construction gives for a prime.

    R. E. A. C. Paley, On orthogonal matrices, Journal of Mathematics and Physics 12 (1933), 311-320.

    Args:
        order: A multiple of four.
    """
    if _is_prime(order - 1):
        return torch.eye(order, dtype=torch.float64) + _conference(order - 1)
    prime = order // 2 - 1
    if prime % 4 == 1 and _is_prime(prime):
        outer, inner = torch.tensor([[[1, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
        return torch.kron(_conference(prime), outer) + torch.kron(torch.eye(prime + 1, dtype=torch.float64), inner)
    return None


def _conference(prime: int) -> Tensor:
    """Return the matrix ``C`` of the quadratic residues, of order ``prime + 1``, with ``C C^T = prime I``.

    It is symmetric for primes that are 1 modulo 4, skew-symmetric for those that are 3.
    """
    residues = torch.full((prime,), -1.0, dtype=torch.float64)
    residues[torch.arange(prime).square() % prime] = 1
    residues[0] = 0
    index = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:] = 1
    matrix[1:, 0] = 1 if prime % 4 == 1 else -1
    matrix[1:, 1:] = residues[(index[:, None] - index) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))
