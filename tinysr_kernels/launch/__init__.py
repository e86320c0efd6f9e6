"""Which implementation an operation gets on which device."""
