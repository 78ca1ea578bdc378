"""Prepared transformers models: the attention "eva", its compressed cache, ``generate``."""
