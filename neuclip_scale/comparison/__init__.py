"""Whether runs can be compared, and how they compare: from their folders alone, whoever made them.

Nothing in a run folder is trusted: a file that is missing, torn or hostile becomes a sentence, not an exception.
Importing this loads neither torch nor matplotlib.
"""

from __future__ import annotations

from neuclip_scale.comparison.comparing import Comparison, Finding, compare_runs
from neuclip_scale.comparison.run_folder import RunFolder, read_run, read_runs

__all__ = ["Comparison", "Finding", "RunFolder", "compare_runs", "read_run", "read_runs"]
