"""How the small pipelines are saved."""

import json
from copy import deepcopy
from pathlib import Path

from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel


def save_pipeline(pipeline: DiffusionPipeline, path: Path) -> None:
    """Saves the pipeline in float16; the given pipeline stays as it is.

    The text encoders' configs say float32, so that plain `from_pretrained` gives float32
    modules, as it does for the autoencoder and the transformer.
    """
    components = pipeline.components
    half = type(pipeline)(
        **{
            name: deepcopy(part).half() if isinstance(part, nn.Module) else part
            for name, part in components.items()
        }
    )
    options = {name for name in pipeline.config if not name.startswith("_")} - components.keys()
    half.register_to_config(**{name: pipeline.config[name] for name in options})
    half.save_pretrained(path)
    for name, part in components.items():
        if isinstance(part, PreTrainedModel):
            file = path / name / "config.json"
            config = json.loads(file.read_text())
            config["dtype"] = "float32"
            file.write_text(json.dumps(config, indent=2) + "\n")
