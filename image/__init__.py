"""Figures: the scripts that draw and check them, and the logs that they come from."""
