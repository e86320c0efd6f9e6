"""The integer state of one program of a kernel, executed instruction by instruction from its disassembly."""
