"""Small random checkpoints in the layouts in which the real ones are published, with the networks they
describe.
"""
