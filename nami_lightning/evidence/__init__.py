"""What runs show: metrics of what they draw, their record, runs side by side, and sweeps."""
