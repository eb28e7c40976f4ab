"""Floor 9: words on the command line become one validated call."""
