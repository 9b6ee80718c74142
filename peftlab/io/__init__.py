"""Files: the library's own format (`native`), built on plain safetensors (`file`)."""

from .file import LoadError
from .native import LoadReport, SaveReport, load, read_header, save

__all__ = ["LoadError", "LoadReport", "SaveReport", "load", "read_header", "save"]
