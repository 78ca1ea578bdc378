"""Caches in few bits: VecInfer's vector quantisation, fp8, and attention to their codes."""
