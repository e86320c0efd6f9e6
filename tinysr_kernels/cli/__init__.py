"""The command `tinysr`, one file per subcommand."""
