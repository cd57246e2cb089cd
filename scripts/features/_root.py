"""Imported first by the commands of this folder: makes the modules of the repository's root importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
