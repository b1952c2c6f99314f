"""One function per command; each reads top to bottom."""
