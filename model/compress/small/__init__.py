"""The recipe at a size that one core trains: a small teacher made from nothing, compressed end to end."""
