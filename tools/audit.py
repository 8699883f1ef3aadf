"""`neuclip audit` for those who cloned the repository: python tools/audit.py --manifest LIST --download DIR."""

from __future__ import annotations

import sys

from neuclip_scale.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["audit", *sys.argv[1:]]))
