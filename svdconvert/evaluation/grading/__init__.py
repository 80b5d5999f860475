"""Decides whether an answer is right: pure functions of texts, which need no model."""
