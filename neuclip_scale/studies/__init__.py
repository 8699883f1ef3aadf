"""Controlled experiments: `normalizer` holds estimators against the truth, `methods` trains and compares objectives."""
