"""Comparison tables from the tracking store only: what was trained, next to what a published table says of it."""
