"""The small parts of an inventory."""
