"""Fuzzers of whatever a user or an attacker can hand over. See harness.py; `make fuzz` runs them at length."""
