"""Word lists -> pairs -> tokens -> packed batches; and the shipped Swahili-English list."""
