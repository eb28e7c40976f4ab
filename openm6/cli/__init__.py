"""The command line: one file per command or group of commands, each of which calls one function of a lower layer."""
