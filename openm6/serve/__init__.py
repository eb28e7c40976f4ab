"""Floor 8: an engine that answers many requests at once, and the HTTP API around it."""
