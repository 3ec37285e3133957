"""Families whose attention does not go through transformers' interface: one module for each.

A module has REPLACEMENTS, from the class of transformers to ours, which is derived from it, holds
what it holds, and differs in ``forward`` alone.
"""

import transformers
from packaging.version import Version

_FAMILIES = (
    "blip",
    "bloom",
    "deberta",
    "deberta_v2",
    "falcon",
    "gpt_neo",
    "mpnet",
    "sam",
    "swinv2",
    "wavlm",
    # From 5.24 on, GPT-J's attention goes through the interface.
    *(["gptj"] if Version(transformers.__version__).release < (5, 24) else []),
)

# From the module of transformers that has the attention to ours. Neither is imported before a model
# has it.
ADAPTERS = {
    f"transformers.models.{family}.modeling_{family}": f"{__name__}.{family}"
    for family in _FAMILIES
} | {
    "transformers.models.blip.modeling_blip_text": f"{__name__}.blip",
    "transformers.models.idefics.perceiver": f"{__name__}.idefics",
}
