"""Hidden states -> numbers per pair: cosine, gap, retrieval, CLIPScore, geometry, perplexity."""
