"""The routes of the API by kind; `openm6/serve/run.py` lists them."""
