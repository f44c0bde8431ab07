"""The machinery that the scripts share, one subject a file."""
