"""How wrong is each estimate of the log-normalizer, and what does that do to the encoders' gradient?"""
