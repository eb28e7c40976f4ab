"""An engine that answers many requests at once, and its HTTP API."""
