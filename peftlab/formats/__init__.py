"""Files: the library's own format (`native`), built on plain safetensors (`file`)."""

from __future__ import annotations

from peftlab.formats.file import LoadError, read_header
from peftlab.formats.native import LoadReport, SaveReport, load, save

__all__ = ["LoadError", "LoadReport", "SaveReport", "load", "read_header", "save"]
