"""Matmuls of tokens with their prologues and epilogues, in half precision and in fp8."""
