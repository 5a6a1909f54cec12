"""Batches: many requests sent to a broker as events, and their results collected as events."""
