"""Scripts that write instruction data here."""
