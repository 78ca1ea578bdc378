"""What an attention mask means: from an FX subgraph to a predicate on (batch, head, query, key)."""
