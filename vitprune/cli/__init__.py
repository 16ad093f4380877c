"""The command line: one file per command, and the output layer."""
