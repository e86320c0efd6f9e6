"""The search: races between candidates, their sessions, the file that winners are stored in."""
