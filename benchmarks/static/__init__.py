"""What is known without a GPU: launch plans, machine code, and the pages made of them."""
