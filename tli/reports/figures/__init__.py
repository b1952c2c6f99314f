"""Figures, readable in grey."""
