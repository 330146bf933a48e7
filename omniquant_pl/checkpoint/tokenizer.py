"""The tokenizer that comes with a checkpoint, or why it cannot be opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from omniquant_pl.checkpoint.tokenizer_files import TokenizerFiles
from omniquant_pl.errors import ConfigurationError

__all__ = ["FoundTokenizer", "open_tokenizer"]


@dataclass(frozen=True)
class FoundTokenizer:
    """What a model folder has for a tokenizer."""

    folder: Path
    """The model folder."""
    tokenizer: PreTrainedTokenizerBase | None = None
    """The tokenizer; null where there is none, or none that opens."""
    problem: str | None = None
    """Why the tokenizer that is there does not open, and what helps; null where it opens or there is none."""

    @property
    def complaint(self) -> str | None:
        """The problem as a sentence that names the folder."""
        return self.problem and f"the tokenizer in {self.folder} cannot be opened: {self.problem}"

    def needed(self, key: str, what_for: str) -> PreTrainedTokenizerBase:
        """Return the tokenizer, for work that cannot do without.

        Args:
            key: The setting that errors name.
            what_for: Continues "the folder has no tokenizer ".

        Raises:
            ConfigurationError: If there is none; it says why.
        """
        if self.tokenizer is not None:
            return self.tokenizer
        raise ConfigurationError(key, self.complaint or f"{self.folder} has no tokenizer {what_for}")


def open_tokenizer(folder: Path, trust_remote_code: bool) -> FoundTokenizer:
    """Open the tokenizer of a model folder.

    For a folder without a vocabulary transformers makes up a tokenizer that knows special tokens alone; that is none.

    Args:
        folder: The model folder.
        trust_remote_code: Whether code that comes with it may run.
    """
    if not folder.is_dir():  # transformers would look for it on the hub
        return FoundTokenizer(folder)
    files = TokenizerFiles(folder)
    if files.problem is not None:
        return FoundTokenizer(folder, problem=files.problem)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
        is_whole = _reads_text(tokenizer)
    except BaseException as error:
        if not _is_failure(error):
            raise
        return FoundTokenizer(folder, problem=_cause(files, error, trust_remote_code))
    if is_whole:
        return FoundTokenizer(folder, tokenizer)
    names = ", ".join(path.name for path in files.vocabularies)
    return FoundTokenizer(folder, problem=f"{type(tokenizer).__name__} finds no tokens in {names}" if names else None)


def _cause(files: TokenizerFiles, error: BaseException, trust_remote_code: bool) -> str | None:
    if files.is_code and not trust_remote_code:
        return "it is code that comes with the model; set model.trust_remote_code to true to let it run"
    return files.cause(error) if files.vocabularies or files.is_code else None


def _is_failure(error: BaseException) -> bool:
    """Return whether opening has failed; a panic of the tokenizers library is no Exception."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _reads_text(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether it has tokens besides special and added ones."""
    return len(tokenizer) > len({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})
