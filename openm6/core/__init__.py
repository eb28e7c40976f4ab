"""Errors, configuration, files, seeds, logs and the device of a process."""
