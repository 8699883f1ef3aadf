"""Trains objectives on the same data, budget and seeds, and compares what comes out."""
