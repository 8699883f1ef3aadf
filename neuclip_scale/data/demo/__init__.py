"""`neuclip demo-data`: real pictures with names (colour icon sets from npm) as training shards and evaluation
sets.

It is clip art. It shows that training, resuming, sharding and evaluation work end to end on a laptop, with
held-out vendors and names; it says nothing about photographs.
"""
