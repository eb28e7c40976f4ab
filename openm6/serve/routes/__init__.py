"""One file for each route of the API; `openm6/serve/app.py` lists them."""
