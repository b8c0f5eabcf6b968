"""Scores: metrics of features, the scoring network, and the embedded benchmark."""
