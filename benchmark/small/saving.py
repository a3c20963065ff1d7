"""How the small pipelines are saved."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast


def save_pipeline(pipeline: DiffusionPipeline, path: Path) -> None:
    """Saves the pipeline in float16, the same before and after use; the given one stays as it is.

    The text encoders' configs say float32, so that plain `from_pretrained` gives float32
    modules, as it does for the autoencoder and the transformer.
    """
    components = pipeline.components
    half = type(pipeline)(**{name: _as_saved(part) for name, part in components.items()})
    options = {name for name in pipeline.config if not name.startswith("_")} - components.keys()
    half.register_to_config(**{name: pipeline.config[name] for name in options})
    half.save_pretrained(path)
    for name, part in components.items():
        if isinstance(part, PreTrainedModel):
            file = path / name / "config.json"
            config = json.loads(file.read_text())
            config["dtype"] = "float32"
            file.write_text(json.dumps(config, indent=2) + "\n")


def _as_saved(part: Any) -> Any:
    if isinstance(part, nn.Module):
        return deepcopy(part).half()
    if isinstance(part, PreTrainedTokenizerFast):
        part = deepcopy(part)
        # the last call's padding and truncation, which every call sets anew
        part.backend_tokenizer.no_padding()
        part.backend_tokenizer.no_truncation()
    return part
