"""Layer 35: image and audio codecs, their quantizers and their trained weights."""
