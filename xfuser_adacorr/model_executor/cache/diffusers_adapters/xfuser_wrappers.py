"""xfuser's legacy wrappers, which hold the diffusers model and have a forward of their own.

Its other transformers subclass a diffusers model and are found under that model's family.
"""

from dataclasses import replace

from .family import register_family
from .flux import FLUX
from .pixart import PIXART

XFUSER_FLUX = register_family(
    replace(
        FLUX,
        name="flux-xfuser",
        transformer_class="xFuserFluxTransformer2DWrapper",
    )
)

XFUSER_PIXART = register_family(
    replace(PIXART, name="pixart-xfuser", transformer_class="xFuserPixArtTransformer2DWrapper")
)
