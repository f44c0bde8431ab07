"""Scripts that write token shards here, and the machinery that only they use."""
