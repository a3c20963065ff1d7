"""Base methods by name; a new one is a file beside these and a line here."""

from .ada import Ada
from .auto import Auto
from .base import BaseMethod
from .fast import Fast
from .fb import Fb
from .tea import Tea

METHOD_CLASSES: dict[str, type[BaseMethod]] = {
    "Fb": Fb,
    "Tea": Tea,
    "Fast": Fast,
    "Ada": Ada,
    "Auto": Auto,
}
