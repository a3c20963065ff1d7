"""xfuser's legacy wrappers, which hold the diffusers model and have a forward of their own.

Its other transformers subclass a diffusers model and are found under that model's family.
"""

from dataclasses import replace
from typing import Any

from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor

from .family import register_family
from .flux import FLUX
from .pixart import PIXART


def make_flux_output(sample: Tensor, return_dict: bool) -> Any:
    """The wrapper returns a pair: the velocity, and text that only earlier stages have."""
    pair = (sample, None)
    return Transformer2DModelOutput(sample=pair) if return_dict else (pair,)


def read_flux_output(output: Any) -> Tensor:
    return (output[0] if isinstance(output, tuple) else output.sample)[0]


XFUSER_FLUX = register_family(
    replace(
        FLUX,
        name="flux-xfuser",
        transformer_class="xFuserFluxTransformer2DWrapper",
        make_output=make_flux_output,
        read_output=read_flux_output,
    )
)

XFUSER_PIXART = register_family(
    replace(PIXART, name="pixart-xfuser", transformer_class="xFuserPixArtTransformer2DWrapper")
)
