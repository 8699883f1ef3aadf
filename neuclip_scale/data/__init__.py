"""Training input: tar shards, their manifest, the canonical streams, transforms and the loader.

`data.shards` and `data.manifest` import no torch, so this package imports nothing by itself.
"""
