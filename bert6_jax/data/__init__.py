"""Text in, token windows out: tokenizer, sources and the memory-mapped token store."""
