"""Matrix products with prologue and epilogue, in half precision and in fp8."""
