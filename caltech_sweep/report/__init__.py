"""Comparison tables from the tracking store alone: what was trained, beside what a published table says of it."""
