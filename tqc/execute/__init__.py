"""How torch runs a rewritten graph: providers chosen, calls fused, what lies between compiled."""
