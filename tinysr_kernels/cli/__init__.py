"""The command `tinysr`: a file per sub-command."""
