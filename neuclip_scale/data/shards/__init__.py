"""Tar shards in webdataset layout (KEY.jpg KEY.txt KEY.json): finding, indexing, reading, writing.

Nothing is ever extracted and no name from a tar becomes a path: a shard is indexed by its headers alone and a
member is read by offset. A shard that is cut off or damaged keeps the samples before the damage and carries a
fault text.
"""

from neuclip_scale.data.shards.finding import expand_shards, expand_source, split_sources
from neuclip_scale.data.shards.index import MAX_MEMBER_BYTES, MemberSpan, ShardIndex, index_shard, read_member
from neuclip_scale.data.shards.names import ShardError
from neuclip_scale.data.shards.writing import write_shard

__all__ = [
    "MAX_MEMBER_BYTES",
    "MemberSpan",
    "ShardError",
    "ShardIndex",
    "expand_shards",
    "expand_source",
    "index_shard",
    "read_member",
    "split_sources",
    "write_shard",
]
