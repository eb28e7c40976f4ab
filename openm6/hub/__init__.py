"""Published decoders in and out: import of Hugging Face and GGUF models, and export of the text path."""
