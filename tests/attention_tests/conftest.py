"""Makes `fusion_kit` and `adapter_kit` importable by their names."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))
