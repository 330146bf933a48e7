"""Compares the logits of an exported folder, loaded by the programs it is meant for, with the calibrated model's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

from omniquant_pl.errors import CalibrationError, ConfigurationError
from omniquant_pl.export.format import Client, Export
from omniquant_pl.model import OmniQuantModel
from omniquant_pl.run.folder import RunFolder

__all__ = ["ClientResult", "Verification", "calibrated_logits", "check_agreement", "verification_table"]


@dataclass(frozen=True)
class ClientResult:
    """What a program computed.

    Attributes:
        client: The program.
        error: Norm of the difference to the calibrated model's logits, over their norm; ``None``: not installed.
    """

    client: Client
    error: float | None

    @property
    def is_equal(self) -> bool:
        """Whether the program computes the calibrated model, as far as it ran."""
        return self.error is None or self.error <= self.client.tolerance


class Verification:
    """Runs the programs that load a format.

    Args:
        export: The format.
        tokens: Token ids ``[batch, tokens]`` to compare logits for.

    Raises:
        ConfigurationError: If none of them is installed.
    """

    def __init__(self, export: Export, tokens: Tensor) -> None:
        self._clients, self._tokens = export.clients, tokens
        if not self._clients:
            raise ConfigurationError("verify", f"no program computes with {export.name} alone")
        if not any(client.is_installed for client in self._clients):
            names = ", ".join(f"{client.name} ({' and '.join(client.packages)})" for client in self._clients)
            message = f"no program that loads {export.name} is installed; known: {names}"
            raise ConfigurationError("verify", message)

    def run(self, model: OmniQuantModel, run: RunFolder, output: Path) -> list[ClientResult]:
        """Compare logits.

        Args:
            model: The run's settings.
            run: The run.
            output: The exported folder.
        """
        results = []
        expected: dict[tuple[bool, torch.dtype], Tensor] = {}
        for client in self._clients:
            if not client.is_installed:
                results.append(ClientResult(client, None))
                continue
            found = client.logits(output, self._tokens)
            kind = (client.quantizes_activations, found.dtype)
            if kind not in expected:
                expected[kind] = calibrated_logits(model, run, self._tokens, *kind)
            error = (found - expected[kind]).norm() / expected[kind].norm()
            results.append(ClientResult(client, float(error)))
        return results


@torch.no_grad()
def calibrated_logits(
    model: OmniQuantModel,
    run: RunFolder,
    tokens: Tensor,
    quantizes_activations: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return what the calibrated model computes, one block in memory at a time, on the CPU.

    Args:
        model: The run's settings.
        run: The run, for its learned factors.
        tokens: Token ids ``[batch, tokens]``.
        quantizes_activations: Whether activations are quantized as the scheme says, or not at all.
        dtype: What it computes in, float32 or float64; the weights are those of float32.

    Returns:
        Logits ``[batch, tokens, vocabulary]``, in that dtype.
    """
    source = model.source
    source.to(torch.device("cpu"), dtype)
    hidden = source.embed(tokens)
    for index, call in enumerate(source.calls(tokens.shape[1])):
        tensors = source.block_tensors(index)
        block = model.folded(index, tensors, call, run.load_factors(index))
        network = block.network if quantizes_activations else source.make_block(index, block.tensors)
        hidden = call(nn.Module.to(network, dtype=dtype), hidden)
    logits = source.logits(hidden)
    source.to(torch.device("cpu"))
    return logits


def verification_table(results: list[ClientResult]) -> Table:
    """Return a table with one program a row."""
    table = Table("program", "relative error of the logits", "allowed", "")
    for result in results:
        client = result.client
        if result.error is None:
            table.add_row(client.name, "", "", f"not installed: {', '.join(client.packages)}")
        else:
            verdict = "equal" if result.is_equal else "differs"
            table.add_row(client.name, f"{result.error:.2e}", f"{client.tolerance:.0e}", verdict)
    return table


def check_agreement(results: list[ClientResult]) -> None:
    """Refuse an export that a program does not compute the calibrated model from.

    Raises:
        CalibrationError: It names the programs.
    """
    differing = ", ".join(result.client.name for result in results if not result.is_equal)
    if differing:
        raise CalibrationError(f"{differing} computes other logits than the calibrated model")
