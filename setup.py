# pyproject.toml holds everything; this shim serves tools that still call setup.py
__import__("setuptools").setup()
