"""Zero-shot classification, retrieval and the error of log-normalizers, beside what guessing would give."""
