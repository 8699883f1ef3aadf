"""From a pool of shards and a list of uids to new shards: planned first, copied without unpacking, verified, resumable.

`planning` scans the pool (`scanning`, `matching`) and makes a `plan`; `copying` writes one output shard; `running`
drives it with a `journal`; `finishing` adds up. No torch.
"""

from neuclip_scale.reshard.errors import DiskFullError, ReshardError, UsageError
from neuclip_scale.reshard.images import ImageWork
from neuclip_scale.reshard.options import ReshardOptions

__all__ = ["DiskFullError", "ImageWork", "ReshardError", "ReshardOptions", "UsageError"]
