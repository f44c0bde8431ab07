"""The machinery that the scripts share, one subject per file."""
