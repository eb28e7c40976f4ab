"""A page to try a model in the browser: scenarios and free questions, in English and Chinese."""
