"""`neuclip reshard` for those who look for DataComp's resharder.py: python tools/reshard.py -i POOL -o OUT -s UIDS."""

from __future__ import annotations

import sys

from neuclip_scale.cli import main

if __name__ == "__main__":
    raise SystemExit(main(["reshard", *sys.argv[1:]]))
