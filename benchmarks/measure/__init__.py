"""How things are timed, and how results are kept."""
