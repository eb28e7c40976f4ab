"""How each data set that comes with the package is made from published packages."""
