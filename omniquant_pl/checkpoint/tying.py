"""Which tensors of a model are one: what is stored decides it, as in transformers, and ``config.json`` only proposes.

``PreTrainedModel.tie_weights`` has the rule, which transformers follows when it loads: a head that is stored beside the
embedding and differs from it stays a head of its own; if only one of the two is stored, both are it.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedModel

__all__ = ["absent_tensors", "tie"]


def absent_tensors(model: PreTrainedModel, is_stored: Callable[[str], bool]) -> set[str]:
    """Return the names of tensors that need not be stored, because what they are tied to is.

    Args:
        model: The model as its configuration makes it.
        is_stored: Tells by its name in the model whether a tensor is stored.
    """
    absent = set()
    for target, owner in model.all_tied_weights_keys.items():
        if not is_stored(target):
            absent.add(target)
        elif not is_stored(owner):
            absent.add(owner)
    return absent


def tie(model: PreTrainedModel, absent: set[str]) -> dict[str, str]:
    """Tie what is one, once the model has all tensors but the absent ones.

    Args:
        model: The model.
        absent: What :func:`absent_tensors` has returned.

    Returns:
        The names of the tensors that are others, with the names of these.
    """
    model.tie_weights(missing_keys=set(absent), recompute_mapping=False)
    return dict(model.all_tied_weights_keys)
