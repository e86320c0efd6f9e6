"""What is tuned: items, their candidates and predicted times, the log of measurements, what a device is asked."""
