"""A checkpoint -> the frozen decoder that ends at layer L, its LoRA adapters, its hidden states."""
