"""Data that is made from the documentation of installed packages."""
