"""The routes of the API by kind; `openm6/serve/app.py` lists them."""
