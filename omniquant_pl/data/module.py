"""The data of a run: windows to calibrate on, and windows to measure perplexity on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from lightning import LightningDataModule
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from omniquant_pl.data.cache import encode_stream
from omniquant_pl.data.files import TOKEN_SUFFIX, resolve
from omniquant_pl.data.sources import dataset_key, is_path, read_text
from omniquant_pl.data.text import Role, key_of
from omniquant_pl.data.tokens import check_vocabulary, encode, read_tokens
from omniquant_pl.data.windows import (
    CutSpec,
    chunk,
    first_windows,
    sample_documents,
    sample_stream,
)
from omniquant_pl.errors import ConfigurationError

__all__ = ["CalibrationData", "TextSettings"]

_LONGEST_DEFAULT = 2048
# Of a dataset that is cut document by document, the original evaluates these random windows.
_DOCUMENT_WINDOWS = 256
_DOCUMENT_SEED = 0


@dataclass(frozen=True)
class TextSettings:
    """What the data needs to know of the model."""

    tokenizer: PreTrainedTokenizerBase | None
    """The model's tokenizer; null where it has none: then only .npy files can be read."""
    positions: int
    """The longest sequence the model can read."""
    vocabulary_size: int
    """Rows of its embedding."""
    seed: int
    """Of the random windows."""
    complaint: str | None = None
    """Why the model's tokenizer does not open; null where it opens or there is none."""


class CalibrationData(LightningDataModule):
    """Windows of token ids for calibration and for evaluation.

    Args:
        dataset: What to calibrate on: builtin (documentation that comes with Python, no network
            needed), wikitext2, c4, ptb, pile, the id of a hub dataset with a column "text", the
            path of a .txt, .jsonl or .parquet file (column "text"), or of a .npy file of token
            ids. Text gives random windows; a .npy of [windows, length] is used as it is, in order.
        samples: How many windows to calibrate on.
        sequence_length: Tokens in a window; null: 2048, or the model's positions where those are
            fewer. A .npy of [windows, length] keeps its own length.
        evaluation: What to measure perplexity on, a list of the same forms; null: [builtin].
            Text gives the adjacent windows of its held-out split, c4 256 random windows.
        batch_size: Windows of one step.
        shuffle: Visit the windows in another order every epoch, rather than in their own.
        micro_batch_size: Windows of a step that are computed at once, for less memory; null: all.
            Their gradients are added up in float64: with 1, factors do not depend on how many
            processes share the windows, with quantized activations too.

    Raises:
        ConfigurationError: If a number is out of range, or two entries of evaluation would be
            reported under one name.
    """

    def __init__(
        self,
        dataset: str = "builtin",
        samples: int = 128,
        sequence_length: int | None = None,
        evaluation: list[str] | None = None,
        batch_size: int = 1,
        shuffle: bool = False,
        micro_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if samples < 1:
            raise ConfigurationError("data.samples", f"{samples} is not a positive number")
        if sequence_length is not None and sequence_length < 2:
            message = f"{sequence_length} is too short, a window holds at least 2 tokens"
            raise ConfigurationError("data.sequence_length", message)
        if batch_size < 1:
            raise ConfigurationError("data.batch_size", f"{batch_size} is not a positive number")
        if micro_batch_size is not None and not 1 <= micro_batch_size <= batch_size:
            message = f"{micro_batch_size} is not between 1 and data.batch_size, {batch_size}"
            raise ConfigurationError("data.micro_batch_size", message)
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.shuffle = shuffle
        self.dataset = dataset
        self.samples = samples
        self.sequence_length = sequence_length
        self.evaluation = _by_key(["builtin"] if evaluation is None else evaluation)
        self._settings: TextSettings | None = None
        self._calibration: Tensor | None = None
        self._evaluation: dict[str, Tensor] | None = None

    def bind(self, text: TextSettings) -> None:
        """Say which model the tokens are for; comes before the tokens are asked for.

        Args:
            text: The model's tokenizer and limits.

        Raises:
            ConfigurationError: If ``data.sequence_length`` is more than the model's positions.
        """
        if self.sequence_length is not None:
            _check_length(self.sequence_length, text.positions)
        self._settings = text
        self._calibration = None
        self._evaluation = None

    def calibration_tokens(self) -> Tensor:
        """Return the windows to calibrate on, read once.

        Returns:
            int64 [samples, length].

        Raises:
            ConfigurationError: If the dataset cannot be read, has too little text, or does not
                fit the model.
        """
        if self._calibration is None:
            self._calibration = self._windows(self.dataset, "calibration")
        return self._calibration

    def evaluation_tokens(self) -> dict[str, Tensor]:
        """Return the windows to measure perplexity on, read once.

        Returns:
            int64 [windows, length] by name, in the configuration's order. The name is the one
            given there, for a path its stem.

        Raises:
            ConfigurationError: As in :meth:`calibration_tokens`.
        """
        if self._evaluation is None:
            names = self.evaluation.items()
            self._evaluation = {key: self._windows(name, "evaluation") for key, name in names}
        return self._evaluation

    @property
    def length(self) -> int:
        """Tokens in a window that is cut from text or from a stream; :meth:`bind` comes first."""
        return self.sequence_length or min(_LONGEST_DEFAULT, self._bound.positions)

    @property
    def _bound(self) -> TextSettings:
        if self._settings is None:
            raise RuntimeError("bind() comes before tokens are asked for")
        return self._settings

    def _windows(self, name: str, role: Role) -> Tensor:
        """Return the windows of one dataset, int64 [windows, length], checked against the model."""
        is_tokens = is_path(name) and name.lower().endswith(TOKEN_SUFFIX)
        read = self._windows_of_tokens if is_tokens else self._windows_of_text
        windows = read(self._spec(name, role))
        tokenizer = None if is_tokens else self._bound.tokenizer
        check_vocabulary(windows, name, self._bound.vocabulary_size, role, tokenizer)
        return windows

    def _spec(self, name: str, role: Role) -> CutSpec:
        return CutSpec(name, role, self.samples, self.length, self._bound.seed)

    def _windows_of_tokens(self, spec: CutSpec) -> Tensor:
        tokens = read_tokens(resolve(spec.name, spec.role), spec.role)
        if tokens.ndim == 1:
            return _cut(tokens, spec)
        _check_length(tokens.shape[1], self._bound.positions, f" (the width of '{spec.name}')")
        return first_windows(tokens, spec) if spec.role == "calibration" else tokens

    def _windows_of_text(self, spec: CutSpec) -> Tensor:
        tokenizer = self._bound.tokenizer
        if tokenizer is None:
            if self._bound.complaint is not None:
                message = f"'{spec.name}' is text, and {self._bound.complaint}"
                raise ConfigurationError(key_of(spec.role), message)
            message = (
                f"the model has no tokenizer to read '{spec.name}' with; give a .npy of ids, or set "
                "model.trust_remote_code to true if the tokenizer is code that comes with the model"
            )
            raise ConfigurationError(key_of(spec.role), message)
        text = read_text(spec.name, spec.role)
        if not text.within_documents:
            return _cut(encode_stream(tokenizer, text), spec)
        if spec.role == "evaluation":
            spec = replace(spec, samples=_DOCUMENT_WINDOWS, seed=_DOCUMENT_SEED)
        return sample_documents(partial(encode, tokenizer), text.documents, spec)


def _cut(tokens: Tensor, spec: CutSpec) -> Tensor:
    """Return a stream [tokens] into random windows to calibrate on, or adjacent ones to evaluate."""
    return sample_stream(tokens, spec) if spec.role == "calibration" else chunk(tokens, spec)


def _check_length(length: int, positions: int, origin: str = "") -> None:
    if length > positions:
        message = f"{length}{origin} is more than the {positions} positions of the model"
        raise ConfigurationError("data.sequence_length", message)
    if length < 2:
        message = f"{length}{origin} is too short, a window holds at least 2 tokens"
        raise ConfigurationError("data.sequence_length", message)


def _by_key(names: list[str]) -> dict[str, str]:
    """Return the entries of ``data.evaluation`` by the name they are reported under."""
    entries: dict[str, str] = {}
    for name in names:
        key = dataset_key(name)
        if key in entries:
            message = f"'{entries[key]}' and '{name}' would both be reported as '{key}'"
            raise ConfigurationError("data.evaluation", message)
        entries[key] = name
    return entries
