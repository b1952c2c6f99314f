"""The names that measurements and tests go by: splits, and the difference of two. Imports no torch."""

SPLITS = {"trained": "trained", "held_out": "held out"}
DIFFERENCE = "trained - held_out"
