"""How good a causal language model is: text, retrieval, and agreement with full attention."""
