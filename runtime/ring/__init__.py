"""The KV ring: what it stores, how, and its learned projections."""
