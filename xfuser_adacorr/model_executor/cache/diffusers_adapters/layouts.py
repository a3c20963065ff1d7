"""Layouts of latents, outputs and blocks that several families share."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def select_hidden_states(arguments: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
    """Keep tokens of `BasicTransformerBlock`; their positions were added before the blocks."""
    kept = {"hidden_states": arguments["hidden_states"][:, index]}
    if arguments.get("attention_mask") is not None:
        kept["attention_mask"] = arguments["attention_mask"][..., index]
    return kept
