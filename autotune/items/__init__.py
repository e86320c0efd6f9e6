"""What is tuned: items, their candidates and predicted times, the log of measurements, the interface of a device."""
