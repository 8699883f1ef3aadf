"""`python -m neuclip_scale` is `neuclip`."""

from __future__ import annotations

import sys

from neuclip_scale.cli import main

sys.exit(main())
