"""Numbers per pair -> intervals, tests, corrections; NumPy and SciPy only."""
