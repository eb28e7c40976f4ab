"""Floor 6: sources of records, the mixture that orders them, and the quarantine for broken ones."""
