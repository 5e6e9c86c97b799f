"""Print a command of the README: the code block after the marker <!-- command: NAME -->."""

from __future__ import annotations

import re
import sys
from pathlib import Path

name = sys.argv[1]
readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
found = re.search(rf"<!-- command: {re.escape(name)} -->\s*```(?:bash|sh)\n(.*?)```", readme, re.S)
if found is None:
    sys.exit(f"README.md has no code block after <!-- command: {name} -->")
print(found.group(1).strip())
