"""Scripts that write preference data here."""
