"""What an author of a method imports: the protocol, what a method sees below it, and checks of options."""

from __future__ import annotations

from peftlab.core.base import Base
from peftlab.core.method import Method
from peftlab.core.options import finite, positive_int, unit_interval

__all__ = ["Base", "Method", "finite", "positive_int", "unit_interval"]
