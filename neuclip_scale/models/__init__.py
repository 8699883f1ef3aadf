"""The two encoders, their tokenizers, and the way to and from open_clip's checkpoints.

`building.build_model(recipe)` is the entry; importing this package alone loads nothing heavy.
"""
