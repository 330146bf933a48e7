"""What a block of each model family looks like, as data, one file each."""

from omniquant_pl.families import falcon as _falcon
from omniquant_pl.families import gemma as _gemma
from omniquant_pl.families import internlm as _internlm
from omniquant_pl.families import llama as _llama
from omniquant_pl.families import mixtral as _mixtral
from omniquant_pl.families import opt as _opt
from omniquant_pl.families import phi as _phi
from omniquant_pl.families import phi3 as _phi3
from omniquant_pl.families import qwen3 as _qwen3
from omniquant_pl.families import qwen_moe as _qwen_moe
from omniquant_pl.families.conversion import StoredPart, conversion_of
from omniquant_pl.families.layout import (
    BlockLayout,
    Experts,
    Family,
    attention_shape,
    family_of,
    register,
    registered_families,
    unknown_family,
)
from omniquant_pl.families.moe import unfused_experts

__all__ = [
    "BlockLayout",
    "Experts",
    "Family",
    "StoredPart",
    "attention_shape",
    "conversion_of",
    "family_of",
    "register",
    "registered_families",
    "unfused_experts",
    "unknown_family",
]

del _falcon, _gemma, _internlm, _llama, _mixtral, _opt, _phi, _phi3, _qwen3, _qwen_moe
